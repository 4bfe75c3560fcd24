"""Oracles in NumPy float64 that share no code with the package, and the tolerances."""

import numpy as np

# Relative error that is allowed: of float64 against float64, of float32 against
# float64 over a few layers, and of exact gradients against central differences.
FLOAT64 = 1e-9
FLOAT32 = 2e-5
DIFFERENCES = 1e-6


def relative_error(got, want) -> float:
    """‖got − want‖ / ‖want‖ over all entries."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert got.shape == want.shape, (got.shape, want.shape)
    return float(np.linalg.norm(got - want) / max(np.linalg.norm(want), 1e-30))


def central_difference(f, x, direction, step=1e-5) -> float:
    """The derivative of the scalar f at x along a direction."""
    return (f(x + step * direction) - f(x - step * direction)) / (2 * step)


def softmax(x, axis):
    """Exponentials that sum to one along an axis."""
    e = np.exp(x - x.max(axis=axis, keepdims=True))
    return e / e.sum(axis=axis, keepdims=True)


def sigmoid(x):
    """The logistic function."""
    return 1 / (1 + np.exp(-x))


def layer_norm(x, p):
    """LayerNorm over the last axis with PyTorch's ε."""
    mean = x.mean(-1, keepdims=True)
    var = ((x - mean) ** 2).mean(-1, keepdims=True)
    return (x - mean) / np.sqrt(var + 1e-5) * p["scale"] + p["bias"]


def linear(x, p):
    """A dense layer; the kernel is [in, out]."""
    return x @ p["kernel"] + p.get("bias", 0)


def mlp(x, p):
    """Two dense layers with a ReLU between."""
    return linear(np.maximum(linear(x, p["enter"]), 0), p["leave"])


def gru(x, h, p):
    """torch.nn.GRUCell, gate by gate."""
    width = h.shape[-1]

    def gate(number, part, v):
        columns = slice(number * width, (number + 1) * width)
        return v @ p[part]["kernel"][:, columns] + p[part]["bias"][columns]

    r = sigmoid(gate(0, "input", x) + gate(0, "recurrent", h))
    z = sigmoid(gate(1, "input", x) + gate(1, "recurrent", h))
    n = np.tanh(gate(2, "input", x) + r * gate(2, "recurrent", h))
    return (1 - z) * n + z * h


def slot_attention(inputs, slots, p, *, iterations, heads, epsilon=1e-8, damping=0.0):
    """Slot attention with heads for one example, as official SLATE has it.

    Args:
      inputs: [N, D_in].
      slots: [K, D].
      p: parameters of `SlotAttention`.
      iterations: applications of the step.
      heads: number of heads.
      epsilon: added before the attention is normalised over the inputs.
      damping: added to the sum that normalises it.

    Returns:
      The slots [K, D] and the attention [K, N] summed over heads.
    """
    count, size = slots.shape
    depth = size // heads
    inputs = layer_norm(inputs, p["norm_inputs"])
    step = p["step"]
    k = linear(inputs, step["project_k"]) * depth**-0.5
    v = linear(inputs, step["project_v"])
    attention = np.zeros((heads, len(inputs), count))
    for _ in range(iterations):
        q = linear(layer_norm(slots, step["norm_slots"]), step["project_q"])
        part = [slice(h * depth, (h + 1) * depth) for h in range(heads)]
        logits = np.stack([k[:, c] @ q[:, c].T for c in part])  # [heads, N, K]
        joint = np.exp(logits - logits.max(axis=(0, 2), keepdims=True))
        attention = joint / joint.sum(axis=(0, 2), keepdims=True)
        weights = attention + epsilon
        weights = weights / (weights.sum(axis=1, keepdims=True) + damping)
        updates = np.concatenate(
            [weights[h].T @ v[:, c] for h, c in enumerate(part)], axis=1
        )
        slots = gru(updates, slots, step["gru"])
        slots = slots + mlp(layer_norm(slots, step["norm_mlp"]), step["mlp"])
    return slots, attention.sum(0).T


def attention(x, memory, p, *, heads, causal):
    """Multi-head attention of one example, one query at a time."""
    q = linear(x, p["project_q"])
    k, v = linear(memory, p["project_k"]), linear(memory, p["project_v"])
    depth = q.shape[-1] // heads
    out = np.zeros_like(q)
    for h in range(heads):
        c = slice(h * depth, (h + 1) * depth)
        for t in range(len(x)):
            seen = slice(0, t + 1) if causal else slice(None)
            weights = softmax(k[seen, c] @ q[t, c] / np.sqrt(depth), axis=0)
            out[t, c] = weights @ v[seen, c]
    return linear(out, p["project_o"])


def transformer(x, memory, p, *, heads):
    """SLATE's decoder for one example; the first block normalises its input."""
    for index in range(len(p["blocks"])):
        b = p["blocks"][index]
        normed = layer_norm(x, b["norm_self"])
        residual = normed if index == 0 else x
        x = residual + attention(
            normed, normed, b["self_attention"], heads=heads, causal=True
        )
        x = x + attention(
            layer_norm(x, b["norm_cross"]),
            memory,
            b["cross_attention"],
            heads=heads,
            causal=False,
        )
        x = x + mlp(layer_norm(x, b["norm_mlp"]), b["mlp"])
    return layer_norm(x, p["norm"])


def convolution(x, kernel, *, stride, padding):
    """Cross-correlation of one image [H, W, C], as PyTorch's Conv2d."""
    size = kernel.shape[0]
    x = np.pad(x, ((padding, padding), (padding, padding), (0, 0)))
    rows = (x.shape[0] - size) // stride + 1
    columns = (x.shape[1] - size) // stride + 1
    out = np.zeros((rows, columns, kernel.shape[-1]))
    for i in range(rows):
        for j in range(columns):
            window = x[i * stride : i * stride + size, j * stride : j * stride + size]
            out[i, j] = np.einsum("abc,abcd->d", window, kernel)
    return out


def conv_block(x, p, *, size, stride=1):
    """Convolution without bias, group norm with one group, ReLU; one image."""
    kernel = p["convolution"]["kernel"]
    if kernel.ndim == 2:
        kernel = kernel.reshape(size, size, -1, kernel.shape[-1])
    x = convolution(x, kernel, stride=stride, padding=size // 2 if stride == 1 else 0)
    x = (x - x.mean()) / np.sqrt(x.var() + 1e-5)
    return np.maximum(x * p["norm"]["scale"] + p["norm"]["bias"], 0)


def pixel_shuffle(x):
    """torch.nn.PixelShuffle(2) of one image, written out."""
    rows, columns, features = x.shape
    out = np.zeros((2 * rows, 2 * columns, features // 4))
    for c in range(features // 4):
        for i in range(2):
            for j in range(2):
                out[i::2, j::2, c] = x[:, :, 4 * c + 2 * i + j]
    return out


def dvae_encode(image, p):
    """Logits [H/4, W/4, V] of one image."""
    layers = p["encoder"]["layers"]
    x = conv_block(image, layers[0], size=4, stride=4)
    for index in range(1, 7):
        x = conv_block(x, layers[index], size=1)
    return linear(x, layers[7])


def dvae_decode(z, p):
    """The image of tokens [H/4, W/4, V]."""
    layers = p["decoder"]["layers"]
    x = conv_block(z, layers[0], size=1)
    for first in (1, 6):
        x = conv_block(x, layers[first], size=3)
        for index in range(first + 1, first + 4):
            x = conv_block(x, layers[index], size=1)
        x = pixel_shuffle(x)
    return linear(x, layers[11])
