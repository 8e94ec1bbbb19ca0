"""The servers that actserve is measured against, one short script each, in the best setting for one core that we know.

Each runs PROGRAM (the .onnx) on PORT with BATCH (the most screens in one inference; 1: no batching) from the
environment, takes a raw screen as the body of a POST and answers {"action": n}.
"""
