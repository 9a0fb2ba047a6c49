"""What a compiler is given to lower, as counts of operators."""

from collections import Counter

import torch
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from tolerances import assert_close
from torch._dynamo.backends.common import aot_autograd


def graphs_of(function, *inputs):
    """What the compiler is given to lower, forward and backward, once it has cleaned up."""
    graphs = []

    def keep(graph, _):
        graphs.append(graph)
        return make_boxed_func(graph)

    torch._dynamo.reset()
    backend = aot_autograd(fw_compiler=keep, bw_compiler=keep, partition_fn=min_cut_rematerialization_partition)
    output = torch.compile(function, fullgraph=True, backend=backend)(*inputs)
    assert_close(output, function(*inputs))
    output.sum().backward()
    assert len(graphs) == 2
    return [Counter(str(node.target) for node in graph.graph.nodes) for graph in graphs]
