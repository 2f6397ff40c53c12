"""Cross entropy over large vocabularies: one read of the logits forward; one read and one write backward.

    loss = (1 - e) w[y] (-log p[y]) + e / V * sum_j w[j] (-log p[j]) + z_loss * logsumexp(x)^2,    p = softmax(x)

Forward, a program walks over one row in blocks with a running maximum and a running sum (Milakov and Gimelshein,
2018). Backward, each block of each row is a program of its own; the gradient may overwrite the logits. Sums are
float32 and in a fixed order. The configuration is chosen from register counts, not timings.
"""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["ignore_index"])
def _cross_entropy_forward_kernel(
    logits_ptr, target_ptr, weight_ptr, losses_ptr, largest_ptr, total_ptr, stride, classes, ignore_index,
    label_smoothing, z_loss, SMOOTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program r: row r. weight_ptr: None for ones. A target outside [0, classes) gives NaN."""
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(target_ptr + row)
    ignored = target == ignore_index
    valid = (target >= 0) & (target < classes)
    row_ptr = logits_ptr + row * stride
    x_target = tl.load(row_ptr + target, mask=valid, other=float("nan")).to(tl.float32)
    w_target = 1.0
    if weight_ptr is not None:
        w_target = tl.load(weight_ptr + target, mask=valid, other=0.0)
    # Label smoothing sums x - x_target, not x: a sum of large logits would lose precision.
    base = tl.where(x_target == -float("inf"), 0.0, x_target)
    largest = tl.full((), -float("inf"), tl.float32)
    total = tl.zeros((), tl.float32)
    shifted = tl.zeros((), tl.float32)
    w_total = tl.zeros((), tl.float32)
    for first in range(0, tl.where(ignored, 0, classes), BLOCK):
        column = first + tl.arange(0, BLOCK)
        inside = column < classes
        x = tl.load(row_ptr + column, mask=inside, other=-float("inf")).to(tl.float32)
        new_largest = tl.maximum(largest, tl.max(x, 0))
        finite = tl.where(new_largest == -float("inf"), 0.0, new_largest)
        total = total * tl.exp(largest - finite) + tl.sum(tl.exp(x - finite), 0)
        largest = new_largest
        if SMOOTH:
            d = tl.where(inside, x - base, 0.0)
            if weight_ptr is not None:
                w = tl.load(weight_ptr + column, mask=inside, other=0.0)
                w_total += tl.sum(w, 0)
                d *= w
            shifted += tl.sum(d, 0)
    log_sum = tl.log(total)
    loss = (1.0 - label_smoothing) * w_target * (log_sum - (x_target - largest))
    if SMOOTH:
        if weight_ptr is None:
            w_total += classes
        loss += label_smoothing / classes * (w_total * (log_sum - (base - largest)) - shifted)
    lse = largest + log_sum
    loss += tl.where(z_loss > 0.0, z_loss * lse * lse, 0.0)
    tl.store(losses_ptr + row, tl.where(ignored, 0.0, loss))
    tl.store(largest_ptr + row, largest)
    tl.store(total_ptr + row, total)


@triton.jit(do_not_specialize=["ignore_index"])
def _cross_entropy_backward_kernel(
    grad_losses_ptr, logits_ptr, target_ptr, weight_ptr, weight_mean_ptr, largest_ptr, total_ptr, grad_ptr,
    stride, grad_stride, classes, ignore_index, label_smoothing, z_loss, SMOOTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program r * blocks + b: block b of row r."""
    blocks = tl.cdiv(classes, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    column = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    inside = column < classes
    target = tl.load(target_ptr + row)
    ignored = target == ignore_index
    valid = (target >= 0) & (target < classes)
    hit = tl.where(valid, 1.0 - label_smoothing, float("nan"))
    if weight_ptr is not None:
        hit *= tl.load(weight_ptr + target, mask=valid, other=0.0)
    largest, total = tl.load(largest_ptr + row), tl.load(total_ptr + row)
    along = hit + tl.where(z_loss > 0.0, 2.0 * z_loss * (largest + tl.log(total)), 0.0)
    to_read = column < tl.where(ignored, 0, classes)
    x = tl.load(logits_ptr + row * stride + column, mask=to_read, other=0.0).to(tl.float32)
    against = tl.where(column == target, hit, 0.0)
    if SMOOTH:
        share = label_smoothing / classes
        if weight_ptr is None:
            along += label_smoothing
            against += share
        else:
            along += label_smoothing * tl.load(weight_mean_ptr)
            against += share * tl.load(weight_ptr + column, mask=inside, other=0.0)
    p = tl.exp(x - largest) * (1.0 / total)
    grad = (p * along - against) * tl.load(grad_losses_ptr + row)
    grad = tl.where(ignored, 0.0, grad)
    tl.store(grad_ptr + row * grad_stride + column, grad.to(grad_ptr.dtype.element_ty), mask=inside)


def config(classes: int) -> tuple[int, int]:
    """Columns per block and warps per program: 16 elements per thread."""
    block = min(4096, max(32, triton.next_power_of_2(classes)))
    return block, max(1, block // 512)


def cross_entropy_forward(
    logits, target, weight, ignore_index, label_smoothing, z_loss, losses, largest, total
) -> None:
    """Write losses, largest and total = sum of exp(x - largest), (rows,) float32.

    logits: (rows, classes), unit stride along the classes. target: (rows,) int64. weight: (classes,) float32 or None.
    """
    rows, classes = logits.shape
    block, num_warps = config(classes)
    _cross_entropy_forward_kernel[(rows,)](
        logits, target, weight, losses, largest, total, logits.stride(0), classes, ignore_index, label_smoothing,
        z_loss, SMOOTH=label_smoothing > 0.0, BLOCK=block, num_warps=num_warps,
    )  # fmt: skip


def cross_entropy_backward(
    grad_losses, logits, target, weight, ignore_index, label_smoothing, z_loss, largest, total, grad
) -> None:
    """Write grad, (rows, classes), unit stride along the classes; it may be the logits themselves."""
    rows, classes = logits.shape
    block, num_warps = config(classes)
    smooth = label_smoothing > 0.0
    weight_mean = weight.mean() if smooth and weight is not None else None
    _cross_entropy_backward_kernel[(rows * triton.cdiv(classes, block),)](
        grad_losses, logits, target, weight, weight_mean, largest, total, grad, logits.stride(0), grad.stride(0),
        classes, ignore_index, label_smoothing, z_loss, SMOOTH=smooth, BLOCK=block, num_warps=num_warps,
    )  # fmt: skip
