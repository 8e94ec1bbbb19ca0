"""TorchRL's networks of several agents, as a list of networks.

TorchRL runs them with `torch.vmap` on a module without weights, which torch.export cannot trace.
"""

from __future__ import annotations

import copy

import torch
from tensordict import TensorDictBase
from torch import Tensor, nn
from torchrl.modules.models.multiagent import MultiAgentNetBase


class AgentNetworks(nn.Module):
    """The same results as `original`: inputs (B, agents, ...) -> (B, agents, ...)."""

    def __init__(self, original: MultiAgentNetBase) -> None:
        super().__init__()
        self.__dict__["original"] = original  # for its settings: its weights are not used
        shared = original.share_params
        each = [original.params] if shared else [original.params[index] for index in range(original.n_agents)]
        self.networks = nn.ModuleList(_network(original._empty_net, weights) for weights in each)

    def forward(self, *inputs: Tensor) -> Tensor:
        original = self.original
        together = torch.cat(inputs, -1) if len(inputs) > 1 else inputs[0]
        axis: int = original.agent_dim % together.ndim
        together = original._pre_forward_check(together)
        if not original.share_params:
            views = [together if original.centralized else together.select(axis, i) for i in range(original.n_agents)]
            return torch.stack([network(view) for network, view in zip(self.networks, views, strict=True)], axis)
        output: Tensor = self.networks[0](together)
        if original.centralized:
            output = output.unsqueeze(axis).expand(*output.shape[:axis], original.n_agents, *output.shape[axis:])
        return output


def _network(empty: nn.Module, weights: TensorDictBase) -> nn.Module:
    """A copy of `empty`, with `weights`."""
    network = copy.deepcopy(empty)
    for path, value in weights.data.flatten_keys(".").items():
        parent, _, name = path.rpartition(".")
        module = network.get_submodule(parent)
        if name in module._buffers:
            module._buffers[name] = value.clone()
        else:
            module.__dict__.pop(name, None)
            module._parameters[name] = nn.Parameter(value.clone(), requires_grad=False)
    return network
