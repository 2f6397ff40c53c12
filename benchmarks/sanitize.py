"""Every op once, forward and backward, on small awkward shapes: what compute-sanitizer watches in gpu.sh."""

import torch

import transformer_fast as tf


def main() -> None:
    device = "cuda"
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for rows, width in ((1, 1), (3, 100), (17, 768), (5, 1025)):
            x, residual = (torch.randn(rows, width, device=device, dtype=dtype, requires_grad=True) for _ in range(2))
            weight, bias = (torch.randn(width, device=device, dtype=dtype, requires_grad=True) for _ in range(2))
            tf.layer_norm(x, (width,), weight, bias).sum().backward()
            tf.rms_norm(x, (width,), weight).sum().backward()
            y, total = tf.add_layer_norm(x, residual, weight, bias, dropout_p=0.1)
            (y.sum() + total.sum()).backward()
            tf.bias_activation(x, bias, "gelu").sum().backward()
        for length, head_dim in ((1, 64), (65, 64), (130, 40)):
            q, k, v = (
                torch.randn(2, 3, length, head_dim, device=device, dtype=dtype, requires_grad=True) for _ in range(3)
            )
            tf.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=0.1).sum().backward()
    torch.cuda.synchronize()


if __name__ == "__main__":
    main()
