"""One test a private name of PyTorch or transformers: what moved, and what in the package stands on it."""

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from tolerances import assert_close
from torch.nn import functional

from eotattn import Rotary, compat

SCALE = 0.5
ON_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@contextmanager
def moved(name, users, library=torch):
    """Says which name moved and who needs it where its function in ``eotattn.compat`` does not do what it did."""
    try:
        yield
    except (AttributeError, ImportError, TypeError, RuntimeError, AssertionError) as error:
        pytest.fail(
            f"{name} is not what it was in {library.__name__} {library.__version__}: mend eotattn.compat, on which "
            f"{users} stand. {type(error).__name__}: {error}"
        )


def test_a_name_that_moved_is_said(monkeypatch):
    monkeypatch.delattr(torch, "_fused_sdp_choice")
    heads = torch.zeros(1, 1, 4, 8)
    said = pytest.raises(pytest.fail.Exception, match=r"_fused_sdp_choice is not what it was in torch 2.*explain stand")
    with said, moved("torch._fused_sdp_choice", "kernels named by explain"):
        compat.fused_attention_choice(heads, heads, heads)


def test_tensor_version():
    with moved("torch.Tensor._version", "remembered tables and caches of lanes"):
        tensor = torch.zeros(3)
        before = compat.tensor_version(tensor)
        tensor.add_(1)
        assert compat.tensor_version(tensor) == before + 1
        with torch.inference_mode():
            assert compat.tensor_version(torch.zeros(3)) == 0


def test_dispatch_modes_are_seen():
    from torch.utils._python_dispatch import TorchDispatchMode

    with moved("torch.utils._python_dispatch._get_current_dispatch_mode", "remembered tables"):
        assert not compat.is_intercepted()
        with TorchDispatchMode():
            assert compat.is_intercepted()
        assert not compat.is_intercepted()


def test_function_transforms_are_seen():
    seen = []

    def look(x):
        seen.append(compat.is_intercepted() and compat.is_transformed())
        return x

    with moved("torch._C._functorch.peek_interpreter_stack", "remembered tables"):
        torch.func.vmap(look)(torch.zeros(2))
        torch.func.grad(look)(torch.tensor(1.0))
        assert seen == [True, True]


def test_plain_tensors():
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

    name = "torch.utils._python_dispatch._disable_current_modes"
    with moved(name, "plans of lanes"), FakeTensorMode(), torch.device("meta"), torch.inference_mode():
        assert isinstance(torch.zeros(2), FakeTensor)
        with compat.plain_tensors():
            tensor = torch.zeros(2)
        assert not isinstance(tensor, FakeTensor)
        assert tensor.device.type == "cpu"
        assert not tensor.is_inference()


def test_tensors_admitted_by_fake_ones():
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

    tensor = torch.zeros(2)
    with moved("torch._guards.active_fake_mode", "plans of lanes"):
        assert compat.admitted(tensor) is tensor
        with FakeTensorMode(allow_non_fake_inputs=True):
            assert compat.admitted(tensor) is tensor
        with FakeTensorMode():
            assert isinstance(compat.admitted(tensor), FakeTensor)


def test_in_backward_pass():
    seen = []

    class Watch(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            seen.append(compat.in_backward_pass())
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            seen.append(compat.in_backward_pass())
            return grad

    with moved("torch._C._current_graph_task_id", "captures of models with checkpointed layers"):
        Watch.apply(torch.ones(2, requires_grad=True)).sum().backward()
        assert seen == [False, True]


def test_in_export():
    """Under ``torch.compile`` it is false, although releases before 2.13 call every graph an export there."""

    class Told(torch.nn.Module):
        def forward(self, x):
            return x + 1 if compat.in_export() else x - 1

    x = torch.zeros(3)
    with moved("torch.compiler._is_exporting_flag", "rotary tables as inputs of compiled graphs"):
        assert not compat.in_export()
        assert_close(torch.compile(Told(), fullgraph=True, backend="eager")(x), x - 1)
        for strict in (False, True):
            assert_close(torch.export.export(Told(), (x,), strict=strict).module()(x), x + 1)


@pytest.mark.parametrize("old", [False, True], ids=["this release", "releases before 2.13"])
def test_rotary_tables_do_not_ask_what_older_releases_answer_wrongly(old, monkeypatch):
    """Their answer to ``is_exporting`` in a graph, a constant, stands in for them."""
    if old:
        monkeypatch.setattr(torch.compiler, "is_exporting", lambda: torch.compiler.is_compiling())
    graphs = []

    def keep(graph, _):
        graphs.append(str(graph.code))
        return graph

    torch._dynamo.reset()
    torch.compile(Rotary(8), fullgraph=True, backend=keep)(torch.zeros(1, 1, 5, 8))
    assert len(graphs) == 1
    assert "cos(" not in graphs[0]


def test_uncompiled():
    with moved("_orig_mod of compiled modules", "captures of compiled models"):
        layer = torch.nn.Linear(2, 2)
        assert compat.uncompiled(torch.compile(layer, backend="eager")) is layer
        assert compat.uncompiled(layer) is layer


@ON_GPU
@pytest.mark.gpu
def test_raw_stream():
    device = torch.device("cuda", torch.cuda.current_device())
    with (
        moved("torch._C._cuda_getCurrentRawStream", "remembered tables on GPUs"),
        torch.cuda.stream(torch.cuda.Stream()),
    ):
        assert compat.raw_stream(device) == torch.cuda.current_stream(device).cuda_stream


def test_wrapper_tensors_are_told_of_operations_once():
    told = []

    class Wrapper(torch.Tensor):
        __torch_function__ = compat.no_torch_function()

        @classmethod
        def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
            told.append(func)
            plain = compat.map_tensors(lambda x: torch.ones(2, 3) if isinstance(x, Wrapper) else x, args)
            return func(*plain, **(kwargs or {}))

    names = "torch.Tensor._make_wrapper_subclass or torch._C._disabled_torch_function_impl"
    with moved(names, "masks without elements in eotattn.integrations"):
        wrapper = compat.wrapper_tensor(Wrapper, (2, 3), dtype=torch.float64, device=torch.device("cpu"))
        assert (tuple(wrapper.shape), wrapper.dtype) == ((2, 3), torch.float64)
        assert type(wrapper + 1) is torch.Tensor
        assert told == [torch.ops.aten.add.Tensor]


def test_map_tensors():
    with moved("torch.utils._pytree.tree_map", "masks without elements in eotattn.integrations"):
        found = compat.map_tensors(lambda x: 2 * x, (1, [2, {"a": 3}]))
        assert found == (2, [4, {"a": 6}])


# Fused attention ----------------------------------------------------------------------------------------------------


def operands(device="cpu", dtype=torch.float64, width=8):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, 3, length, width, generator=generator).to(device, dtype) for length in (5, 7, 7)]


def expected(query, key, value):
    """Output and log-sum-exp by the formula, in float64."""
    query, key, value = query.double(), key.double(), value.double()
    logits = SCALE * query @ key.mT
    return torch.softmax(logits, -1) @ value, torch.logsumexp(logits, -1)


def test_fused_attention_choice():
    with moved("torch._fused_sdp_choice", "kernels named by explain"):
        name = compat.fused_attention_choice(*operands(dtype=torch.float32), scale=SCALE)
        assert name in {"flash_attention", "math"}
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            assert compat.fused_attention_choice(*operands(dtype=torch.float32), scale=SCALE) == "math"


def test_cpu_flash_attention():
    with moved("aten._scaled_dot_product_flash_attention_for_cpu", "row statistics and transport on CPUs"):
        output, log_sum_exp = compat.cpu_flash_attention(*operands(), 0.0, False, scale=SCALE)
        truth = expected(*operands())
        assert_close(output, truth[0])
        assert_close(log_sum_exp, truth[1])


def test_cpu_flash_attention_backward():
    leaves = [x.requires_grad_() for x in operands()]
    truth, log_sum_exp = expected(*leaves)
    grad = torch.randn(truth.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    wanted = torch.autograd.grad(truth, leaves, grad)
    name = "aten._scaled_dot_product_flash_attention_for_cpu_backward"
    with moved(name, "gradients of row statistics and transport on CPUs"), torch.no_grad():
        saved = (truth.detach(), log_sum_exp.detach())
        found = compat.cpu_flash_attention_backward(grad, *operands(), *saved, 0.0, False, scale=SCALE)
        for one, other in zip(found, wanted, strict=True):
            assert_close(one, other)


def on_gpu(dtype, width=64):
    return operands("cuda", dtype, width)


@ON_GPU
@pytest.mark.gpu
def test_cudnn_attention():
    with moved("aten._scaled_dot_product_cudnn_attention", "row statistics and transport on GPUs"):
        inputs = on_gpu(torch.bfloat16)
        output, log_sum_exp, *_ = compat.cudnn_attention(*inputs, None, True, 0.0, False, False, scale=SCALE)
        truth = expected(*inputs)
        assert_close(output.double(), truth[0], tolerance=3e-2)
        assert_close(log_sum_exp.reshape(truth[1].shape).double(), truth[1], tolerance=3e-2)


@ON_GPU
@pytest.mark.gpu
def test_efficient_attention():
    with moved("aten._scaled_dot_product_efficient_attention", "row statistics and transport on GPUs"):
        inputs = on_gpu(torch.float32)
        output, log_sum_exp, *_ = compat.efficient_attention(*inputs, None, True, 0.0, False, scale=SCALE)
        truth = expected(*inputs)
        assert_close(output.double(), truth[0], tolerance=1e-2)  # tf32 may be on
        assert_close(log_sum_exp[..., : inputs[0].shape[2]].double(), truth[1], tolerance=1e-2)


@ON_GPU
@pytest.mark.gpu
def test_efficient_attention_backward():
    leaves = [x.requires_grad_() for x in on_gpu(torch.float32)]
    truth = expected(*leaves)[0]
    grad = torch.randn(truth.shape, generator=torch.Generator().manual_seed(1)).to("cuda")
    wanted = torch.autograd.grad(truth, leaves, grad.double())
    name = "aten._scaled_dot_product_efficient_attention_backward"
    with moved(name, "gradients of row statistics and transport on GPUs"), torch.no_grad():
        inputs = on_gpu(torch.float32)
        output, *saved = compat.efficient_attention(*inputs, None, True, 0.0, False, scale=SCALE)
        rest = (0.0, [True, True, True, False], False)
        found = compat.efficient_attention_backward(grad, *inputs, None, output, *saved, *rest, scale=SCALE)
        for one, other in zip(found, wanted, strict=False):
            assert_close(one.double(), other.double(), tolerance=1e-2)


# transformers -------------------------------------------------------------------------------------------------------


def test_attention_implementation_of_a_configuration():
    transformers = pytest.importorskip("transformers")
    name = "PretrainedConfig._attn_implementation_internal"
    with moved(name, "captures of models of transformers", transformers):
        config = transformers.LlamaConfig(attn_implementation="eager")
        assert compat.names_attention_implementation(config)
        assert compat.attention_implementation(config) == "eager"
        compat.set_attention_implementation(config, "a name that nobody registered")
        assert config._attn_implementation == "a name that nobody registered"  # what models ask for
        assert not compat.names_attention_implementation(SimpleNamespace())


def test_attention_functions_are_forgotten():
    transformers = pytest.importorskip("transformers")
    with moved("AttentionInterface._global_mapping", "captures of models of transformers", transformers):
        for interface in (transformers.AttentionInterface, transformers.AttentionMaskInterface):
            interface.register("ours", functional.scaled_dot_product_attention)
            assert "ours" in interface()
        compat.forget_attention_implementation("ours")
        assert "ours" not in transformers.AttentionInterface()
        assert "ours" not in transformers.AttentionMaskInterface()


def test_context_parallel_region():
    with moved("context_parallel's replacement of scaled_dot_product_attention", "attention in context_parallel"):
        from torch.distributed.tensor.experimental._context_parallel import _attention as engine

        class Mesh:
            def get_local_rank(self):
                return 2

            def size(self):
                return 5

        assert compat.context_parallel_region() is None
        engine._enable_context_parallel_dispatcher_impl(seq_dim=2, mesh=Mesh())
        try:
            assert compat.context_parallel_region() == (2, 5, engine._cp_options.enable_load_balance)
        finally:
            engine._disable_context_parallel_dispatcher_impl()
        assert compat.context_parallel_region() is None


def test_first_parameter():
    with moved("torch.nn.Module._parameters and _modules", "layers that check where their prior is"):
        deep = torch.nn.Sequential(torch.nn.ReLU(), torch.nn.Sequential(torch.nn.Identity(), torch.nn.Linear(2, 2)))
        assert compat.first_parameter(deep) is next(deep.parameters())
        assert compat.first_parameter(torch.nn.Sequential(torch.nn.Linear(1, 1), deep)) is not next(deep.parameters())
        assert compat.first_parameter(torch.nn.ReLU()) is None


def test_has_forward_hooks():
    with moved("torch.nn.Module._forward_hooks or ._forward_pre_hooks", "projections of layers that are looked into"):
        for register in ("register_forward_hook", "register_forward_pre_hook"):
            module = torch.nn.Linear(2, 2)
            assert not compat.has_forward_hooks(module)
            hook = getattr(module, register)(lambda *_: None)
            assert compat.has_forward_hooks(module)
            hook.remove()
            assert not compat.has_forward_hooks(module)


def test_constant_in_graphs():
    with moved("_dynamo_marked_constant of functions", "lane plans in compiled graphs"):

        class Maker:
            @compat.constant_in_graphs
            def name(self, number):
                return f"number {number}"

        maker = Maker()
        compiled = torch.compile(lambda x: x + len(maker.name(3)), fullgraph=True, backend="eager")
        assert compiled(torch.ones(1)).item() == 9.0


def test_sizes_that_a_graph_knows():
    seen = []

    def look(x):
        seen.append(compat.known_size(x.shape[0]))
        return x + 1

    with moved("torch.fx.experimental.symbolic_shapes.statically_known_true", "tables of features in graphs"):
        assert [compat.known_size(size) for size in (0, 1, 77, 2**30)] == [0, 1, 77, 2**30]
        torch.compile(look, backend="eager", fullgraph=True, dynamic=False)(torch.zeros(77))
        torch.compile(look, backend="eager", fullgraph=True, dynamic=True)(torch.zeros(78))
        assert seen == [77, None]


def test_tensors_that_last():
    with moved("torch._dynamo.mark_static_address", "constants of compiled graphs"):
        tensor = torch.zeros(3)
        assert compat.lasting(tensor) is tensor
        assert tensor._dynamo_static_input_type
        assert compat.lasting(None) is None
