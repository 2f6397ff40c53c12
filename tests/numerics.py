"""The accuracy rule of all tests: the error against float64 is at most a factor times that of plain PyTorch."""

import torch

OUTPUT, GRADIENT = 2.0, 3.0

# If plain PyTorch happens to be exact, this many units in the last place (ulps) of the largest value are allowed.
FLOOR_ULPS = 2.0


def assert_as_accurate(
    actual: torch.Tensor,
    truth_fp64: torch.Tensor,
    eager_same_dtype: torch.Tensor,
    factor: float = OUTPUT,
    name: str = "result",
) -> None:
    """Assert that |actual - truth| <= factor * |eager - truth|, for the largest error and for the root mean square.

    actual and eager_same_dtype have the dtype under test. truth_fp64 is the float64 result. NaN never passes.
    """
    assert actual.shape == truth_fp64.shape, f"{name}: shape {tuple(actual.shape)}, wanted {tuple(truth_fp64.shape)}"
    assert truth_fp64.dtype == torch.float64, f"{name}: truth must be float64"
    if actual.numel() == 0:
        return
    assert not actual.isnan().any(), f"{name}: {int(actual.isnan().sum())} NaN of {actual.numel()}"
    finite = truth_fp64.isfinite()
    assert torch.equal(actual[~finite].double(), truth_fp64[~finite]), f"{name}: infinities differ"
    if not finite.any():
        return
    truth = truth_fp64[finite]
    error, eager_error = (actual.double()[finite] - truth).abs(), (eager_same_dtype.double()[finite] - truth).abs()
    floor = FLOOR_ULPS * torch.finfo(actual.dtype).eps * truth.abs().max().item()
    for kind, ours, theirs in (
        ("largest", error.max().item(), eager_error.max().item()),
        ("root mean square", error.square().mean().sqrt().item(), eager_error.square().mean().sqrt().item()),
    ):
        bound = factor * max(theirs, floor if kind == "largest" else floor / 4)
        assert ours <= bound, (
            f"{name}: {kind} error {ours:.3e} over {bound:.3e} ({factor} x plain PyTorch's {theirs:.3e}, "
            f"floor {floor:.1e}) in {actual.dtype}"
        )


def pooled(gradients: dict[str, torch.Tensor], truth: dict[str, torch.Tensor]) -> torch.Tensor:
    """All gradients as one vector, each scaled by its true size. The errors of a single small tensor depend on chance,
    because all its elements inherit one upstream rounding."""
    largest = max(t.abs().max().item() for t in truth.values())
    scales = {name: max(t.abs().max().item(), 0.05 * largest) for name, t in truth.items()}
    return torch.cat([(gradients[name] / scales[name]).flatten() for name in truth])
