"""The loss: both versions against an independent float64 brute force, and what must never
happen.
"""

import itertools
import math
import shutil

import pytest
import torch

from imsvd_core.loss import CrossJointEntropyLoss, cross_joint_entropy
from imsvd_core.streaming import _slabs

WEIGHTS = dict(diagonal_weight=0.7, off_diagonal_weight=1.3, invariance_weight=0.4)
CASES = [(6, 4), (5, [2, 3, 1]), (1, 3), (7, [4]), (4, [1, 1]), (3, [5, 2])]


def brute_force(z1, z2, units, invariance="inner_product", temperature=1.0, **weights):
    """Eq. 11 by loops over samples, variables and units: no code shared with the package."""
    n, d = z1.shape
    counts = [units] * (d // units) if isinstance(units, int) else list(units)
    edges = [sum(counts[:v]) for v in range(len(counts) + 1)]
    codes = [
        [
            [
                torch.exp(z[i, a:b] / temperature) / torch.exp(z[i, a:b] / temperature).sum()
                for a, b in itertools.pairwise(edges)
            ]
            for i in range(n)
        ]
        for z in (z1, z2)
    ]
    variables = range(len(counts))
    de = oe = ti = torch.zeros((), dtype=z1.dtype)
    for v in variables:
        for w in variables:
            for b in range(counts[v]):
                for c in range(counts[w]):
                    if v == w and b != c:
                        continue
                    cell = sum(codes[0][i][v][b] * codes[1][i][w][c] for i in range(n)) / n
                    if v == w:
                        de = de + cell * cell.log()
                    else:
                        oe = oe + cell * cell.log()
        for i in range(n):
            p, q = codes[0][i][v], codes[1][i][v]
            ti = ti - (
                (p * q).sum().log() if invariance == "inner_product" else (p * q.log()).sum()
            )
    de, ti = de / len(counts), ti / (n * len(counts))
    oe = oe / (len(counts) * (len(counts) - 1)) if len(counts) > 1 else oe
    total = sum(
        weights.get(f"{name}_weight", 1.0) * term
        for name, term in (("diagonal", de), ("off_diagonal", oe), ("invariance", ti))
    )
    return total, de, oe, ti


def logits(n, units, dtype=torch.float64, seed=0, scale=2.0):
    d = 3 * units if isinstance(units, int) else sum(units)
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(n, d, generator=generator, dtype=torch.float64) * scale)
        .to(dtype)
        .requires_grad_()
        for _ in "12"
    ]


def textbook(z1, z2, units, **settings):
    return cross_joint_entropy(z1, z2, units, **settings)


def streaming(z1, z2, units, **settings):
    return CrossJointEntropyLoss(units, **settings)(z1, z2)


@pytest.mark.parametrize("version", [textbook, streaming])
@pytest.mark.parametrize("invariance", ["inner_product", "cross_entropy"])
@pytest.mark.parametrize(("n", "units"), CASES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])
def test_terms_and_gradients_equal_the_brute_force(version, invariance, n, units, dtype, tolerance):
    z1, z2 = logits(n, units, dtype)
    settings = dict(invariance=invariance, temperature=0.6, **WEIGHTS)
    ours = version(z1, z2, units, **settings)
    y1, y2 = (z.detach().double().requires_grad_() for z in (z1, z2))
    truth = brute_force(y1, y2, units, **settings)
    for mine, true in zip(ours, truth, strict=True):
        torch.testing.assert_close(mine.double(), true, rtol=tolerance, atol=tolerance)
    for mine, true in zip(
        torch.autograd.grad(ours.total, (z1, z2)),
        torch.autograd.grad(truth[0], (y1, y2)),
        strict=True,
    ):
        torch.testing.assert_close(mine.double(), true, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("units", [3, [2, 4, 3]])
@pytest.mark.parametrize("invariance", ["inner_product", "cross_entropy"])
def test_gradcheck(units, invariance):
    loss = CrossJointEntropyLoss(units, invariance=invariance, temperature=0.8, **WEIGHTS)
    assert torch.autograd.gradcheck(lambda a, b: loss(a, b).total, logits(5, units))


@pytest.mark.parametrize("variables", [51, 102])
def test_slabs_end_with_whole_cache_lines_which_products_are_faster_on(variables):
    dim = 80 * variables
    slabs = _slabs(torch.zeros(1, dim), (80,) * variables, range(dim), range(variables))
    assert {len(cells) % 16 for _, cells, *_ in slabs} == {0}


def test_slabs_and_chunks_do_not_change_the_result(monkeypatch):
    z1, z2 = logits(9, 4)
    whole = streaming(z1, z2, 4)
    gradient = torch.autograd.grad(whole.total, (z1, z2))
    monkeypatch.setattr("imsvd_core.streaming.SLAB_CELLS", 1)
    monkeypatch.setattr("imsvd_core.streaming.CHUNK_ENTRIES", 25)
    pieces = streaming(z1, z2, 4)
    torch.testing.assert_close(tuple(pieces), tuple(whole), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        torch.autograd.grad(pieces.total, (z1, z2)), gradient, rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("units", [2, 5])
def test_uniform_codes_have_the_exact_values(units):
    z = torch.zeros(4, 3 * units, dtype=torch.float64)
    expected = (-2 * math.log(units) / units, -2 * math.log(units), math.log(units))
    for terms in (textbook(z, z, units), streaming(z, z, units)):
        assert [t.item() for t in terms[1:]] == pytest.approx(expected, abs=1e-12)


def test_hard_codes_give_minus_three_entropies_plus_information():
    """On hard codes L = −3·H̄₁ + Ī: here two equal variables, H = I = log 2, so L = −2 log 2."""
    z = torch.tensor([[1.0, -1, 1, -1], [-1, 1, -1, 1]], dtype=torch.float64) * 400
    assert streaming(z, z, 2).total.item() == pytest.approx(-2 * math.log(2), abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("invariance", ["inner_product", "cross_entropy"])
@pytest.mark.parametrize("units", [4, [3, 5, 4]])
@pytest.mark.parametrize("temperature", [1.0, 0.1])
def test_any_finite_logits_give_finite_value_and_gradient(dtype, invariance, units, temperature):
    generator = torch.Generator().manual_seed(1)
    largest = torch.finfo(dtype).max
    for magnitude in (0.0, 1e-3, 30.0, 300.0, 6e4, largest):
        z = [
            (torch.rand(8, 12, generator=generator, dtype=torch.float64) * 2 - 1)
            .mul(magnitude)
            .to(dtype)
            for _ in "12"
        ]
        z[0][:4] = magnitude * torch.randint(0, 2, (4, 12), generator=generator).mul(2).sub(1).to(
            dtype
        )
        z = [x.clamp(-largest, largest).requires_grad_() for x in z]
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype != torch.float32):
            terms = CrossJointEntropyLoss(units, invariance=invariance, temperature=temperature)(*z)
        terms.total.backward()
        assert all(term.isfinite() for term in terms), (magnitude, terms)
        assert all(x.grad.isfinite().all() for x in z), magnitude


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("weights", [{}, dict(diagonal_weight=0.0)])
def test_a_logit_that_is_no_finite_number_spoils_value_and_gradient(value, dtype, weights):
    z = [x.detach().to(dtype) for x in logits(5, 3)]
    z[1][2, 4] = value
    z = [x.requires_grad_() for x in z]
    total = CrossJointEntropyLoss(3, **weights)(*z).total
    assert total.isnan()
    assert all(g.isnan().all() for g in torch.autograd.grad(total, z))


def test_products_are_accumulated_in_float32_under_autocast():
    z1, z2 = logits(64, 4, torch.float32)
    plain = streaming(z1, z2, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = streaming(z1, z2, 4)
    assert tuple(cast) == tuple(plain)


def test_half_precision_logits_keep_gradients_that_a_scaler_lifts():
    """A gradient below fp16's smallest number must survive until the loss scale has multiplied
    it.
    """
    z = [x.detach().to(torch.float16).requires_grad_() for x in logits(4096, 2, scale=0.1)]
    scale = 2.0**16
    (streaming(*z, 2).total * scale).backward()
    wide = [x.detach().float().requires_grad_() for x in z]
    streaming(*wide, 2).total.backward()
    assert (wide[0].grad.abs() < 6e-8).any()
    torch.testing.assert_close(z[0].grad.float() / scale, wide[0].grad, rtol=2e-3, atol=1e-10)


def test_gradient_scales_with_what_comes_from_above_and_can_be_asked_for_twice():
    z1, z2 = logits(5, 3)
    total = streaming(z1, z2, 3).total
    (once,) = torch.autograd.grad(total, z1, retain_graph=True)
    (thrice,) = torch.autograd.grad(3 * total, z1)
    torch.testing.assert_close(thrice, 3 * once)


@pytest.mark.slow  # a step at full width
@pytest.mark.parametrize(
    ("dim", "units"), [(1024, 32), (2000, 500), (20_000, 20), (3000, [1000] + [2] * 1000)]
)
def test_never_holds_the_matrix(dim, units):
    """No allocation may reach a quarter of the matrix, whatever the number and the sizes of the
    variables.
    """
    z = torch.randn(4, dim, requires_grad=True)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for item in out if isinstance(out, (tuple, list)) else (out,):
                if isinstance(item, torch.Tensor):
                    largest = max(largest, item.untyped_storage().nbytes())
            return out

    with Watch():
        CrossJointEntropyLoss(units)(z, z).total.backward()
    assert 0 < largest < max(dim**2, 4e6) * 4 / 4


def test_sums_over_a_large_matrix_stay_exact_in_float32():
    generator = torch.Generator().manual_seed(0)
    z1, z2 = torch.randn(2, 64, 4080, generator=generator) * 10
    ours, exact = (
        CrossJointEntropyLoss(80)(z1.to(dtype), z2.to(dtype))
        for dtype in (torch.float32, torch.float64)
    )
    for mine, true in zip(ours, exact, strict=True):
        torch.testing.assert_close(mine.double(), true, rtol=1e-6, atol=1e-6)


def test_evaluating_without_gradients_first_does_not_spoil_training():
    with torch.inference_mode():
        textbook(*logits(3, [3, 2, 6]), [3, 2, 6])
    textbook(*logits(3, [3, 2, 6]), [3, 2, 6]).total.backward()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(units=0), "units=0"),
        (dict(units=2.0), "units=2.0"),
        (dict(units=[3, 0]), "units="),
        (dict(units=[]), "units="),
        (dict(units=2, diagonal_weight=-1), "diagonal_weight=-1"),
        (dict(units=2, invariance_weight=math.nan), "invariance_weight"),
        (dict(units=2, off_diagonal_weight=math.inf), "off_diagonal_weight"),
        (dict(units=2, invariance="cosine"), "cosine"),
        (dict(units=2, temperature=0), "temperature=0"),
    ],
)
def test_impossible_settings_are_refused_at_construction(settings, message):
    with pytest.raises(ValueError, match=message):
        CrossJointEntropyLoss(**settings)


@pytest.mark.parametrize(
    ("z1", "z2", "message"),
    [
        (torch.zeros(2, 4), torch.zeros(3, 4), "shape"),
        (torch.zeros(2, 2, 2), torch.zeros(2, 2, 2), "shape"),
        (torch.zeros(0, 4), torch.zeros(0, 4), "non-empty"),
        (torch.zeros(2, 5), torch.zeros(2, 5), "does not divide"),
        (torch.zeros(2, 4), torch.zeros(2, 4).double(), "float64"),
        (torch.zeros(2, 4).int(), torch.zeros(2, 4).int(), "floating"),
    ],
)
@pytest.mark.parametrize("version", [textbook, streaming])
def test_logits_that_do_not_fit_are_refused(version, z1, z2, message):
    with pytest.raises(ValueError, match=message):
        version(z1, z2, 2)


def gradients(z, units, **settings):
    terms = CrossJointEntropyLoss(units, **settings)(*z)
    return terms, torch.autograd.grad(terms.total, z)


@pytest.mark.parametrize(
    ("units", "drawn"), [(4, 1), (4, 2), ((2, 4, 3), 1), ((2, 4, 3), 2), ((2, 4, 3), 3)]
)
def test_the_mean_over_all_draws_of_block_rows_is_the_whole_loss_and_gradient(
    monkeypatch, units, drawn
):
    z = logits(9, units)
    whole, of_whole = gradients(z, units, temperature=0.7, **WEIGHTS)
    parts = []
    for order in itertools.permutations(range(3)):
        monkeypatch.setattr(torch, "randperm", lambda n, order=order: torch.tensor(order))
        parts.append(gradients(z, units, sampled_variables=drawn, temperature=0.7, **WEIGHTS))
    for place, term in enumerate(whole):
        torch.testing.assert_close(sum(terms[place] for terms, _ in parts) / 6, term)
    for view, truth in enumerate(of_whole):
        torch.testing.assert_close(sum(found[view] for _, found in parts) / 6, truth)
    if drawn < 3:
        assert len({terms.off_diagonal_entropy.item() for terms, _ in parts}) > 1


@pytest.mark.parametrize("drawn", [None, 40])
def test_bf16_products_change_the_gradient_by_less_than_a_percent(drawn):
    z = logits(256, [8] * 51, torch.float32)
    found = []
    for products in ("fp32", "bf16"):
        torch.manual_seed(0)
        found.append(gradients(z, [8] * 51, products=products, sampled_variables=drawn))
    (exact, of_exact), (rounded, of_rounded) = found
    assert 0 < abs(rounded.total - exact.total) < 1e-3
    assert exact.diagonal_entropy == rounded.diagonal_entropy
    assert exact.transform_invariance == rounded.transform_invariance
    for truth, gradient in zip(of_exact, of_rounded, strict=True):
        assert 0 < (gradient - truth).norm() < 0.01 * truth.norm()


@pytest.mark.parametrize("fast", [False, True])
def test_auto_takes_bf16_where_it_is_fast_within_a_thousandth_of_the_gradient(monkeypatch, fast):
    z = logits(256, [16] * 32, torch.float32)
    monkeypatch.setattr("imsvd_core.streaming.bf16_is_fast", lambda device: fast)
    (exact, of_exact), (bf16, _), (auto, of_auto) = (
        gradients(z, [16] * 32, products=products) for products in ("fp32", "bf16", "auto")
    )
    assert exact.total != bf16.total
    assert auto.total == (bf16 if fast else exact).total
    assert abs(auto.total - exact.total) < 1e-4 * abs(exact.total)
    for truth, gradient in zip(of_exact, of_auto, strict=True):
        assert (gradient - truth).norm() < 1e-3 * truth.norm()


def test_bf16_slopes_of_nearly_uniform_codes_are_rounded_near_zero():
    """Only log P less its value at uniform codes, −2 log B, is small there: bf16 rounds in
    proportion.
    """
    z = logits(256, [16] * 20, torch.float32, scale=0.3)
    (_, of_exact), (_, of_rounded) = (
        gradients(z, [16] * 20, products=products, diagonal_weight=0.0, invariance_weight=0.0)
        for products in ("fp32", "bf16")
    )
    for truth, gradient in zip(of_exact, of_rounded, strict=True):
        assert (gradient - truth).norm() < 0.02 * truth.norm()


@pytest.mark.slow  # compiles three functions
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs g++ for a CPU")
@pytest.mark.parametrize(
    ("invariance", "products"), [("inner_product", "bf16"), ("cross_entropy", "fp32")]
)
def test_fused_kernels_give_the_same_numbers(invariance, products):
    z = logits(64, [8] * 9, torch.float32)
    (plain, of_plain), (fused, of_fused) = (
        gradients(z, [8] * 9, invariance=invariance, products=products, fused=fused)
        for fused in (False, True)
    )
    torch.testing.assert_close(tuple(fused), tuple(plain), rtol=1e-6, atol=1e-6)
    tolerance = dict(rtol=1e-5, atol=1e-8) if products == "fp32" else dict(rtol=1e-2, atol=1e-6)
    torch.testing.assert_close(of_fused, of_plain, **tolerance)


@pytest.mark.slow  # ten thousand calls of each
def test_ten_thousand_extreme_inputs_under_autocast_stay_finite_where_fp16_does_not():
    generator = torch.Generator().manual_seed(0)
    broken = 0
    for call in range(10_000):
        dtype = (torch.float16, torch.bfloat16)[call % 2]
        magnitude = 10 ** (
            torch.rand((), generator=generator).item() * 6.8 - 2
        )  # 0.01 to 63,000, fp16's largest
        z = [
            (torch.randn(4, 6, generator=generator) * magnitude)
            .to(dtype)
            .clamp(-65504, 65504)
            .requires_grad_()
            for _ in "12"
        ]
        loss = CrossJointEntropyLoss(
            3,
            invariance=("inner_product", "cross_entropy")[call // 2 % 2],
            products=("fp32", "bf16")[call // 4 % 2],
        )
        with torch.autocast("cpu", dtype=dtype):
            terms = loss(*z)
        found = torch.autograd.grad(terms.total, z)
        assert torch.stack(terms).isfinite().all(), (call, magnitude)
        assert all(g.isfinite().all() for g in found), (call, magnitude)
        if dtype is torch.float16:
            broken += textbook_in_fp16(*z).isnan().item()
    assert broken > 100


def textbook_in_fp16(z1, z2):
    """What autocast makes of the loss written plainly: products and clamps in half precision."""
    p1, p2 = (z.unflatten(1, (2, 3)).softmax(-1).flatten(1) for z in (z1, z2))
    cells = (p1.T @ p2 / len(p1)).clamp_min(1e-8)
    return (cells * cells.log()).sum()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("products", ["fp32", "bf16"])
@pytest.mark.parametrize("invariance", ["inner_product", "cross_entropy"])
def test_a_gpu_gives_the_cpus_loss(fused, products, invariance):
    z = logits(256, [8] * 51, torch.float32)
    on_gpu = [x.detach().cuda().requires_grad_() for x in z]
    terms, of_cpu = gradients(z, [8] * 51, invariance=invariance)
    same, of_gpu = gradients(
        on_gpu, [8] * 51, invariance=invariance, products=products, fused=fused
    )
    tolerance = 1e-5 if products == "fp32" else 1e-2
    torch.testing.assert_close(
        torch.stack(same).cpu(), torch.stack(terms), rtol=tolerance / 10, atol=tolerance / 10
    )
    for found, truth in zip(of_gpu, of_cpu, strict=True):
        assert (found.cpu() - truth).norm() < tolerance * truth.norm()
