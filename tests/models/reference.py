"""The Llama family once more, in float64 NumPy and without loops over layers unrolled.

Written from the papers' formulas and one token pair at a time, to be obviously right;
the model of the library is compared with it.
"""

import numpy as np


def norm(x, scale, eps):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * scale


def silu(x):
    return x / (1 + np.exp(-x))


def softmax(x):
    e = np.exp(x - x.max())
    return e / e.sum()


def rotated(head, angle):
    """One head at one position; pairs are (i, i + c/2)."""
    half = len(head) // 2
    out = head.copy()
    for i in range(half):
        a, b = head[i], head[i + half]
        out[i] = a * np.cos(angle[i]) - b * np.sin(angle[i])
        out[i + half] = b * np.cos(angle[i]) + a * np.sin(angle[i])
    return out


def logits(config, weights, tokens):
    """Returns [t, vocab] for one document; `weights` have Hugging Face names."""
    c = config
    w = {name: np.asarray(value, np.float64) for name, value in weights.items()}
    x = w["model.embed_tokens.weight"][tokens]
    frequencies = c.rope_frequencies().astype(np.float64)
    for i in range(c.num_layers):
        layer = f"model.layers.{i}"

        def project(x, name, layer=layer):
            y = x @ w[f"{layer}.{name}.weight"].T
            return y + w.get(f"{layer}.{name}.bias", 0)

        def heads(h, name, count, layer=layer, project=project):
            y = project(h, f"self_attn.{name}_proj").reshape(len(h), count, -1)
            scale = w.get(f"{layer}.self_attn.{name}_norm.weight")
            return y if scale is None else norm(y, scale, c.norm_eps)

        h = norm(x, w[f"{layer}.input_layernorm.weight"], c.norm_eps)
        q, k = heads(h, "q", c.num_heads), heads(h, "k", c.num_kv_heads)
        v = heads(h, "v", c.num_kv_heads)
        mixed = np.zeros_like(q)
        for t in range(len(x)):
            first = 0 if c.sliding_window is None else max(0, t - c.sliding_window + 1)
            for n in range(c.num_heads):
                m = n // (c.num_heads // c.num_kv_heads)
                query = rotated(q[t, n], t * frequencies)
                scores = [
                    query @ rotated(k[s, m], s * frequencies)
                    for s in range(first, t + 1)
                ]
                weight = softmax(np.array(scores) / np.sqrt(c.head_dim))
                mixed[t, n] = weight @ v[first : t + 1, m]
        x = x + project(mixed.reshape(len(x), -1), "self_attn.o_proj")
        h = norm(x, w[f"{layer}.post_attention_layernorm.weight"], c.norm_eps)
        inner = silu(project(h, "mlp.gate_proj")) * project(h, "mlp.up_proj")
        x = x + project(inner, "mlp.down_proj")
    x = norm(x, w["model.norm.weight"], c.norm_eps)
    return x @ w.get("lm_head.weight", w["model.embed_tokens.weight"]).T
