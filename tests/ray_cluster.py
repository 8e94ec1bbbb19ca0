"""A Ray cluster of several nodes on this machine with the service on it, until stdin ends. Ray's Python runs this:

    python -m tests.ray_cluster PORT CPUS,CPUS,… '{"store": …}'

It prints a line of JSON once the service is ready, and for each line of stdin another: where the replicas are.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import ray
from ray import serve
from ray.cluster_utils import Cluster

from actserve.server.ray import build, home_of_node

OBJECT_STORE_BYTES = 80 << 20
LOOPBACK = "127.0.0.2"  # Ray replaces 127.0.0.1 by an address that others reach


def replicas() -> list[dict[str, Any]]:
    """The living ones."""
    actors = ray._private.state.actors().values()
    return [
        {"pid": actor["Pid"], "home": home_of_node(actor["Address"]["NodeID"])}
        for actor in actors
        if actor["ActorClassName"].startswith("ServeReplica") and actor["State"] == "ALIVE"
    ]


def main(port: int, nodes: list[int], arguments: dict[str, Any]) -> None:
    cluster = Cluster()
    for cpus in nodes:
        cluster.add_node(
            num_cpus=cpus,
            object_store_memory=OBJECT_STORE_BYTES,
            include_dashboard=False,
            node_ip_address=LOOPBACK,
            include_log_monitor=False,
            wait=False,
        )
    cluster.wait_for_nodes()
    ray.init(cluster.address, log_to_driver=False)
    serve.start(proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": port})
    serve.run(build(arguments))
    print(json.dumps(replicas()), flush=True)
    for _ in sys.stdin:
        print(json.dumps(replicas()), flush=True)
    serve.shutdown()
    ray.shutdown()
    cluster.shutdown()


if __name__ == "__main__":
    main(int(sys.argv[1]), [int(cpus) for cpus in sys.argv[2].split(",")], json.loads(sys.argv[3]))
