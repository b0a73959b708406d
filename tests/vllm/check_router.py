"""Runs inside the runtime image: what the replacement's entry does with a kernel that answers like the compiled one.

stdin: JSON {name: source of a reap_router.py}; stdout, last line: JSON {name: {check: null or what is wrong}}. Needs
torch alone: the double of ``ops.topk_hash_softplus_sqrt`` below computes in fp32 and refuses the counts that the
compiled kernel refuses.
"""

import json
import sys
import types

import torch

TOKENS, TOP_K, SCALE, VOCABULARY = 16, 6, 2.5, 40
COUNTS = (1, 2, 4, 8, 16, 32, 64, 128, 192, 256, 320, 384, 448, 512, 576)
REFUSAL = "topk_softplus_sqrt_kernels.cu:512: Unsupported expert number: {}"


class Kernel:
    """The double: it remembers every call, and raises what it is told to."""

    def __init__(self):
        self.calls = []
        self.error = None

    def topk_hash_softplus_sqrt(
        self, weights, ids, unused, logits, renormalize, scale, bias=None, tokens=None, table=None, **later
    ):
        self.calls.append({"logits": logits, "bias": bias, "table": table, **later})
        if self.error is not None:
            raise self.error
        experts = logits.shape[-1]
        if experts not in COUNTS:
            raise RuntimeError(REFUSAL.format(experts))
        scores = torch.nn.functional.softplus(logits.float()).sqrt()
        choice = scores if bias is None or table is not None else scores + bias
        chosen = torch.sort(choice, dim=-1, descending=True, stable=True).indices[:, : weights.shape[-1]]
        if table is not None:
            padding = later.get("is_padding")
            # As the compiled kernel: a row of padding does not look into the table.
            chosen = table[tokens if padding is None else tokens.masked_fill(padding, 0)].long()
        found = scores.gather(1, chosen)
        if renormalize:
            total = found.sum(dim=-1, keepdim=True)
            found = found / torch.where(total > 0, total, 1.0)
        found = found * scale
        if (padding := later.get("is_padding")) is not None:
            found, chosen = found.masked_fill(padding[:, None], 0.0), chosen.masked_fill(padding[:, None], -1)
        weights.copy_(found)
        ids.copy_(chosen)


def load(source, kernel, variant="torch", gpu=False):
    """The module as it is placed in an image, with the double in the kernel's place."""
    package = types.ModuleType("vllm")
    package._custom_ops = kernel
    sys.modules.update({"vllm": package, "vllm._custom_ops": kernel})
    module = types.ModuleType("reap_router")
    exec(compile(source, "reap_router.py", "exec"), module.__dict__)
    module.VARIANT = variant
    if gpu:
        module.has_kernel = lambda logits: True
    return module


class Call:
    """Tensors of one call of the entry."""

    def __init__(self, experts, hashed=False, **later):
        draw = torch.Generator().manual_seed(experts)
        self.weights, self.ids = torch.empty(TOKENS, TOP_K), torch.empty(TOKENS, TOP_K, dtype=torch.int32)
        self.logits = torch.randn(TOKENS, experts, generator=draw) * 2
        self.bias = 8.08 + torch.randn(experts, generator=draw) * 0.3
        rows = [torch.randperm(experts, generator=draw)[:TOP_K] for _ in range(VOCABULARY)]
        self.table = torch.stack(rows).int() if hashed else None
        self.tokens = torch.randint(VOCABULARY, (TOKENS,), generator=draw).int() if hashed else None
        self.later = later

    def __call__(self, entry):
        entry.topk_hash_softplus_sqrt(
            self.weights, self.ids, None, self.logits, True, SCALE, self.bias, self.tokens, self.table, **self.later
        )
        return self

    def expected(self):
        """Ids and weights in double precision; the lowest id on ties."""
        scores = torch.nn.functional.softplus(self.logits.double()).sqrt()
        ids = torch.sort(scores + self.bias.double(), dim=-1, descending=True, stable=True).indices[:, :TOP_K]
        padding = self.later.get("is_padding")
        if self.table is not None:
            tokens = self.tokens if padding is None else torch.where(padding, 0, self.tokens)
            ids = self.table[tokens].long()
        weights = scores.gather(1, ids)
        weights = weights / weights.sum(dim=-1, keepdim=True) * SCALE
        if padding is not None:
            ids, weights = ids.masked_fill(padding[:, None], -1), weights.masked_fill(padding[:, None], 0.0)
        return ids, weights

    def check(self):
        ids, weights = self.expected()
        assert torch.equal(self.ids.long(), ids), f"ids {self.ids[0].tolist()}, wanted {ids[0].tolist()}"
        worst = (self.weights.double() - weights).abs().max().item()
        assert worst <= 1e-6 * SCALE, f"a weight differs by {worst}"


def supported_counts_stay_native(source):
    for variant in ("torch", "padded"):
        for experts in [count for count in COUNTS if count >= TOP_K]:
            kernel = Kernel()
            entry = load(source, kernel, variant, gpu=True)
            entry.replacement = None  # a call of it would end here
            Call(experts)(entry).check()
            assert len(kernel.calls) == 1, f"{experts}: {len(kernel.calls)} calls of the kernel"
            assert kernel.calls[0]["logits"].shape[-1] == experts
            assert not entry._refused, entry._refused


def refusal_is_remembered(source):
    kernel = Kernel()
    entry = load(source, kernel)
    for _ in range(3):
        Call(144)(entry).check()
    assert len(kernel.calls) == 1, f"the kernel was asked {len(kernel.calls)} times"
    Call(160)(entry).check()
    assert len(kernel.calls) == 2, "the refusal of one count was taken for that of another"
    Call(192)(entry).check()
    assert entry._refused == {(144, "cpu"), (160, "cpu")}, entry._refused


def other_errors_propagate(source):
    for error in (
        RuntimeError("CUDA error: an illegal memory access was encountered"),
        RuntimeError("CUDA out of memory"),
        AttributeError("'NoneType' object has no attribute 'shape'"),
        NotImplementedError("Could not run '_C::rms_norm' with arguments from the 'CPU' backend"),
    ):
        kernel = Kernel()
        entry = load(source, kernel)
        kernel.error = error
        raised = raised_by(lambda entry=entry: Call(144)(entry))
        assert raised is error, f"{error!r} became {raised!r}"
        assert not entry._refused, "an error of another kind was remembered as a refusal"


def builds_without_the_kernel_are_routed(source):
    for error in (
        AttributeError("'_OpNamespace' '_moe_C' object has no attribute 'topk_softplus_sqrt'"),
        NotImplementedError("Could not run '_moe_C::topk_softplus_sqrt' with arguments from the 'CPU' backend"),
    ):
        kernel = Kernel()
        entry = load(source, kernel)
        kernel.error = error
        Call(192)(entry).check()


def padded_sees_the_next_count(source):
    for experts, wide in ((144, 192), (160, 192), (130, 192), (180, 192), (200, 256), (500, 512)):
        for hashed in (False, True):
            kernel = Kernel()
            entry = load(source, kernel, "padded", gpu=True)
            call = Call(experts, hashed)
            call(entry).check()
            assert [one["logits"].shape[-1] for one in kernel.calls] == [experts, wide]
            seen = kernel.calls[1]
            assert torch.equal(seen["logits"][:, :experts], call.logits)
            assert (seen["logits"][:, experts:] == float("-inf")).all(), "logits are not padded with -inf"
            if hashed:
                assert seen["bias"] is call.bias, "a hash layer ignores the bias; padding it is a launch for nothing"
            else:
                assert torch.equal(seen["bias"][:experts], call.bias)
                assert (seen["bias"][experts:] == -1e30).all(), "the bias is not padded with -1e30"
            assert call.ids.max() < experts


def padded_without_a_bias_keeps_real_experts_on_ties(source):
    kernel = Kernel()
    entry = load(source, kernel, "padded", gpu=True)
    call = Call(144)
    call.logits = torch.full_like(call.logits, float("-inf"))
    call.bias = None
    call(entry)
    assert torch.equal(call.ids.long(), torch.arange(TOP_K).expand(TOKENS, TOP_K)), call.ids[0].tolist()
    assert (call.weights == 0).all()


def padded_passes_later_arguments_on(source):
    kernel = Kernel()
    entry = load(source, kernel, "padded", gpu=True)
    padding = torch.arange(TOKENS) % 4 == 0
    call = Call(144, is_padding=padding, bias_vl=torch.ones(144), image_sentinel_lo=0)
    call(entry).check()
    seen = kernel.calls[1]
    assert seen["is_padding"] is padding
    assert seen["bias_vl"].shape == (192,)
    assert (seen["bias_vl"][144:] == -1e30).all()


def padded_off_the_gpu_is_plain(source):
    kernel = Kernel()
    Call(144)(load(source, kernel, "padded")).check()
    assert [one["logits"].shape[-1] for one in kernel.calls] == [144]


def more_experts_than_any_kernel_are_plain(source):
    kernel = Kernel()
    Call(600)(load(source, kernel, "padded", gpu=True)).check()
    assert [one["logits"].shape[-1] for one in kernel.calls] == [600]


def padding_may_lie_outside_the_table(source):
    padding = torch.arange(TOKENS) % 3 == 0
    for variant in ("torch", "padded"):
        for outside in (-1, VOCABULARY, 2**31 - 1):
            entry = load(source, Kernel(), variant, gpu=True)
            call = Call(144, hashed=True, is_padding=padding)
            call.tokens = torch.where(padding, outside, call.tokens).int()
            call(entry).check()


def image_tokens_may_lie_outside_the_table(source):
    first = VOCABULARY + 10
    entry = load(source, Kernel())
    call = Call(144, hashed=True, bias_vl=torch.zeros(144), image_sentinel_lo=first)
    image = torch.arange(TOKENS) % 3 == 0
    call.tokens = torch.where(image, first + torch.arange(TOKENS) % 5, call.tokens).int()
    call(entry)
    scores = torch.nn.functional.softplus(call.logits.double()).sqrt()
    free = torch.sort(scores, dim=-1, descending=True, stable=True).indices[:, :TOP_K]
    assert torch.equal(call.ids[image].long(), free[image])
    assert torch.equal(call.ids[~image], call.table[call.tokens[~image]])


def unknown_arguments_are_refused(source):
    entry = load(source, types.SimpleNamespace(topk_hash_softplus_sqrt=refuse))
    raised = raised_by(lambda: Call(144, soft=1)(entry))
    assert isinstance(raised, TypeError), f"an argument that could change the routing: {raised!r}"
    assert "soft" in str(raised)


def raised_by(call):
    try:
        call()
    except Exception as error:
        return error
    return None


def refuse(*args, **later):
    raise RuntimeError(REFUSAL.format(144))


CHECKS = (
    supported_counts_stay_native,
    refusal_is_remembered,
    other_errors_propagate,
    builds_without_the_kernel_are_routed,
    padded_sees_the_next_count,
    padded_without_a_bias_keeps_real_experts_on_ties,
    padded_passes_later_arguments_on,
    padded_off_the_gpu_is_plain,
    more_experts_than_any_kernel_are_plain,
    padding_may_lie_outside_the_table,
    image_tokens_may_lie_outside_the_table,
    unknown_arguments_are_refused,
)


def main():
    # The tensors are small: threads that wait for each other cost more than they bring.
    torch.set_num_threads(1)
    answers = {}
    for name, source in json.load(sys.stdin).items():
        answers[name] = {}
        for check in CHECKS:
            raised = raised_by(lambda check=check, source=source: check(source))
            answers[name][check.__name__] = None if raised is None else f"{type(raised).__name__}: {raised}"
    print(json.dumps(answers))


if __name__ == "__main__":
    main()
