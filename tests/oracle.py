"""ELECTRA in NumPy, float64, one row, one piece and one head at a time: slow, and nothing shared with the package.

Written from the description of the original (paper and released code). Only the names in the parameter tree and the
meaning of the explicit noise arrays are the package's. Tests feed the same noise to both and compare.
"""

import math

import numpy as np
from scipy.special import erf

# --- Selection of positions ---------------------------------------------------------------------


def slots(mask_prob, seq_len):
    """Slots for selected positions a row."""
    return int((mask_prob + 0.005) * seq_len)


def quota(num_tokens, mask_prob, num_slots):
    """Selected positions of a row with that many tokens, specials included; halves go to the even number."""
    product = np.float32(num_tokens) * np.float32(mask_prob)
    whole, half = math.floor(product), float(product) - math.floor(product)
    rounded = whole + (half > 0.5 or (half == 0.5 and whole % 2 == 1))
    return max(1, min(num_slots, rounded))


def select_row(ids, pieces, specials, select_noise, show_noise, *, mask_id, num_slots, mask_prob, shown_prob, distinct):
    """Returns positions, weights, targets, shown, masked ids of one row.

    Noise: without replacement a uniform a position, the candidates with the largest are taken; with replacement
    a uniform a slot, which takes candidate number floor(u * candidates).
    """
    num_tokens = sum(piece > 0 for piece in pieces)
    candidates = [i for i, (token, piece) in enumerate(zip(ids, pieces, strict=True))
                  if piece > 0 and token not in specials]
    k = quota(num_tokens, mask_prob, num_slots)
    if distinct:
        chosen = sorted(candidates, key=lambda i: (-select_noise[i], i))[:k]
    elif candidates:
        ranks = np.floor(np.float32(len(candidates)) * np.asarray(select_noise, np.float32)).astype(int)
        chosen = [candidates[min(rank, len(candidates) - 1)] for rank in ranks[:k]]
    else:
        chosen = []
    unused = num_slots - len(chosen)
    positions = chosen + [0] * unused
    weights = [1.0] * len(chosen) + [0.0] * unused
    targets = [int(ids[i]) for i in chosen] + [0] * unused
    shown = [bool(np.float32(u) < np.float32(shown_prob)) for u in show_noise[: len(chosen)]] + [False] * unused
    masked = scatter_row(ids, [mask_id] * num_slots, [i if s else 0 for i, s in zip(positions, shown, strict=True)])
    return positions, weights, targets, shown, masked


def scatter_row(ids, updates, positions):
    """Writes updates at positions; what meets there is summed and floor-divided by its number; position 0 stays."""
    landed = {}
    for update, position in zip(updates, positions, strict=True):
        landed.setdefault(int(position), []).append(int(update))
    out = [int(token) for token in ids]
    for position, values in landed.items():
        if position != 0:
            out[position] = sum(values) // len(values)
    return out


def select(batch, specials, noise, **options):
    """`select_row` for every row of a batch, each result stacked."""
    rows = zip(batch["input_ids"], batch["piece_ids"], noise["select"], noise["show"], strict=True)
    return [np.array(x) for x in zip(*(select_row(i, p, specials, s, u, **options) for i, p, s, u in rows),
                                     strict=True)]


def replace(ids, sampled, positions, weights):
    """Returns the discriminator's input and its labels: 1 where a selected position got another token."""
    corrupted = np.array([scatter_row(*row) for row in zip(ids, sampled, positions, strict=True)])
    labels = np.zeros(ids.shape, int)
    for row, (places, used) in enumerate(zip(positions, weights, strict=True)):
        for place in places[used > 0]:
            labels[row, place] = place != 0 and corrupted[row, place] != ids[row, place]
    return corrupted, labels


# --- Sampling -----------------------------------------------------------------------------------


def token_probabilities(logits, target, temperature=1.0, disallow_correct=False):
    """The distribution that replacements are drawn from, for one slot."""
    logits = np.asarray(logits, np.float64) / temperature
    if disallow_correct:
        logits = np.where(np.arange(len(logits)) == target, logits - 1000.0, logits)
    weights = np.exp(logits - logits.max())
    return weights / weights.sum()


def draw_two_level(probabilities, noise, chunk=128):
    """Inverse CDF over chunks, then within the chunk. Returns the id, and how far the nearest boundary was."""
    starts = np.arange(0, len(probabilities), chunk)
    c, outer = _inverse_cdf(np.add.reduceat(probabilities, starts), noise[0])
    within = probabilities[starts[c] : starts[c] + chunk]
    i, inner = _inverse_cdf(within / within.sum(), noise[1])
    return starts[c] + i, min(outer, inner)


def _inverse_cdf(probabilities, u):
    edges = np.cumsum(probabilities)
    return int(np.searchsorted(edges, u, side="right")), np.abs(edges - float(u)).min()


def draw_gumbel(probabilities, noise):
    """Argmax of log-probabilities plus float32 Gumbel noise. Returns the id, and its lead over the second."""
    small = np.float32(1e-9)
    gumbel = -np.log(-np.log(np.asarray(noise, np.float32) + small) + small)
    with np.errstate(divide="ignore"):
        scores = np.log(probabilities) + gumbel
    second, first = np.sort(scores)[-2:]
    return int(np.argmax(scores)), first - second


def sample(logits, targets, noise, sampler, **options):
    """Replacements [B, M] and the margin by which each was decided."""
    draw = {"two_level": draw_two_level, "gumbel": draw_gumbel}[sampler]
    flat = [draw(token_probabilities(row, target, **options), u)
            for row, target, u in zip(logits.reshape(-1, logits.shape[-1]), targets.reshape(-1),
                                      np.asarray(noise, np.float64).reshape(targets.size, -1), strict=True)]
    ids, margins = zip(*flat, strict=True)
    return np.array(ids).reshape(targets.shape), np.array(margins).reshape(targets.shape)


# --- Losses -------------------------------------------------------------------------------------


def mlm_loss(logits, targets, weights):
    """Sum of the slots' cross-entropies, and their number."""
    total = 0.0
    for index in zip(*np.nonzero(weights), strict=True):
        row = np.asarray(logits[index], np.float64)
        total += row.max() + math.log(np.exp(row - row.max()).sum()) - row[targets[index]]
    return total, float(weights.sum())


def rtd_loss(logits, labels, pieces):
    """Sum of the binary cross-entropies of all tokens but padding, and their number."""
    total = 0.0
    for index in zip(*np.nonzero(pieces), strict=True):
        signed = float(logits[index]) * (1 if labels[index] else -1)
        total += math.log1p(math.exp(-abs(signed))) + max(-signed, 0.0)
    return total, float((pieces > 0).sum())


def joint_loss(mlm, rtd, mlm_weight=1.0, rtd_weight=50.0):
    """Weighted sum of both means; each part is (sum, number) or None."""
    return sum(w * part[0] / (part[1] + 1e-6) for w, part in ((mlm_weight, mlm), (rtd_weight, rtd)) if part)


# --- The networks -------------------------------------------------------------------------------


def dense(x, p):
    return x @ p["kernel"] + p["bias"]


def layer_norm(x, p, eps=1e-12):
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + eps) * p["scale"] + p["bias"]


def gelu(x):
    return 0.5 * x * (1.0 + erf(x / math.sqrt(2.0)))


def embed(p, ids, types, positions):
    """Sum of the tables' rows, normalised; rotary models have no position table."""
    x = p["word_embeddings"]["embedding"][ids] + p["token_type_embeddings"]["embedding"][types]
    if "position_embeddings" in p:
        x = x + p["position_embeddings"]["embedding"][positions]
    return layer_norm(x, p["norm"])


def attend(x, p, pieces, positions, num_heads, theta):
    """Self-attention of one row [L, D], piece by piece and head by head; theta None: no rotation."""
    size = x.shape[-1] // num_heads
    q, k, v = (x @ p["qkv_kernel"][:, i] + p["qkv_bias"][i] for i in range(3))
    out = np.zeros_like(x)
    for piece in np.unique(pieces):
        rows = np.flatnonzero(pieces == piece)
        for head in range(num_heads):
            columns = slice(head * size, (head + 1) * size)
            queries, keys = q[rows, columns], k[rows, columns]
            if theta is not None:
                queries, keys = (turn(t, positions[rows], theta) for t in (queries, keys))
            scores = queries @ keys.T / math.sqrt(size)
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            out[rows, columns] = weights / weights.sum(-1, keepdims=True) @ v[rows, columns]
    return dense(out, p["out"])


def turn(x, positions, theta):
    """Rotary positions as complex numbers: the j-th pair turns by position * theta ** (-2j / K)."""
    half = x.shape[-1] // 2
    turned = (x[:, :half] + 1j * x[:, half:]) * np.exp(
        1j * np.outer(positions, [theta ** (-2 * j / (2 * half)) for j in range(half)]))
    return np.concatenate([turned.real, turned.imag], -1)


def encode(x, p, pieces, positions, num_heads, norm="post", theta=None):
    """Projection where there is one, and the layers: [B, L, E] -> [B, L, D]."""
    if "embeddings_project" in p:
        x = dense(x, p["embeddings_project"])
    for i in range(sum(name.startswith("layer_") for name in p)):
        q = p[f"layer_{i}"]

        def attention(x, q=q):
            return np.stack([attend(*row, num_heads, theta) for row in zip(
                x, [q["attention"]] * len(x), pieces, positions, strict=True)])

        def feed_forward(x, q=q):
            return dense(gelu(dense(x, q["ffn"]["in"])), q["ffn"]["out"])

        if norm == "post":
            x = layer_norm(x + attention(x), q["attention_norm"])
            x = layer_norm(x + feed_forward(x), q["ffn_norm"])
        else:
            x = x + attention(layer_norm(x, q["attention_norm"]))
            x = x + feed_forward(layer_norm(x, q["ffn_norm"]))
    return layer_norm(x, p["final_norm"]) if norm == "pre" else x


def _encode(params, model, network, ids, batch):
    tables = params["generator"].get("embeddings") if network == "generator" else None
    tables = tables or params["embeddings"]
    encoder = params[network].get("encoder") or params["discriminator"]["encoder"]   # sharing everything
    width = encoder["layer_0"]["attention"]["qkv_kernel"].shape[0]
    num_heads = max(1, width // (model.hidden_size // model.num_heads))
    theta = model.rotary_theta if model.positions == "rotary" else None
    x = embed(tables, ids, batch["token_type_ids"], batch["position_ids"])
    return encode(x, encoder, batch["piece_ids"], batch["position_ids"], num_heads, model.norm, theta), tables


def generator_logits(params, model, ids, batch, positions):
    """Vocabulary logits [B, M, V] at the given positions; the output layer is the token table."""
    hidden, tables = _encode(params, model, "generator", ids, batch)
    hidden = np.stack([row[places] for row, places in zip(hidden, positions, strict=True)])
    head = params["generator"]["head"]
    x = layer_norm(gelu(dense(hidden, head["dense"])), head["norm"])
    return x @ tables["word_embeddings"]["embedding"].T + head["bias"]


def discriminator_hidden(params, model, ids, batch):
    return _encode(params, model, "discriminator", ids, batch)[0]


def discriminator_logits(params, model, ids, batch):
    """Was-replaced logits [B, L]."""
    head = params["discriminator"]["head"]
    hidden = discriminator_hidden(params, model, ids, batch)
    return dense(gelu(dense(hidden, head["dense"])), head["logit"])[..., 0]


def forward(params, config, batch, selection, sampler_noise=None, sampled=None):
    """The joint loss and what it is made of; draws the replacements unless they are given."""
    positions, weights, targets, shown, masked = selection
    model, o = config.model, config.objective
    out = {"mlm": None, "rtd": None}
    logits = np.zeros((*positions.shape, model.vocab_size))
    if not o.uniform_generator:
        logits = generator_logits(params, model, masked, batch, positions)
        out["mlm"] = mlm_loss(logits, targets, weights)
        right = logits.argmax(-1) == targets
        out["mlm_correct"], out["mlm_shown"] = (right & shown).sum(), shown.sum()
        out["mlm_shown_loss"] = mlm_loss(logits, targets, shown)[0]
    if o.name == "electra":
        if sampled is None:
            sampled, out["margin"] = sample(logits, targets, sampler_noise, o.sampler, temperature=o.temperature,
                                            disallow_correct=o.disallow_correct)
        corrupted, labels = replace(batch["input_ids"], sampled, positions, weights)
        logits = discriminator_logits(params, model, corrupted, batch)
        real = batch["piece_ids"] > 0
        out |= {"sampled": sampled, "rtd": rtd_loss(logits, labels, batch["piece_ids"]),
                "replaced": labels[real].sum(), "rtd_correct": ((logits > 0) == labels)[real].sum()}
    out["loss"] = joint_loss(out["mlm"], out["rtd"], o.mlm_weight, o.rtd_weight)
    return out


# --- Optimizer ----------------------------------------------------------------------------------


def learning_rate(step, *, peak, steps, warmup, end=0.0, power=1.0):
    """Polynomial decay over the whole run, multiplied with a linear warm-up; steps count from 0."""
    decayed = (peak - end) * (1 - min(step, steps) / steps) ** power + end
    return decayed * (min(1.0, step / warmup) if warmup else 1.0)


def adamw(params, grads_of_steps, rates, decayed, *, beta1, beta2, eps, weight_decay, clip_norm):
    """Yields the parameters {name: array} after each step of the published AdamW: no bias correction."""
    params = {name: np.asarray(x, np.float64) for name, x in params.items()}
    m = {name: np.zeros_like(x) for name, x in params.items()}
    v = {name: np.zeros_like(x) for name, x in params.items()}
    for grads, rate in zip(grads_of_steps, rates, strict=False):
        norm = math.sqrt(sum(float((np.asarray(g, np.float64) ** 2).sum()) for g in grads.values()))
        shrink = clip_norm / norm if clip_norm and norm > clip_norm else 1.0
        for name, p in params.items():
            g = np.asarray(grads[name], np.float64) * shrink
            m[name] = beta1 * m[name] + (1 - beta1) * g
            v[name] = beta2 * v[name] + (1 - beta2) * g**2
            update = m[name] / (np.sqrt(v[name]) + eps)
            params[name] = p - rate * (update + (weight_decay * p if decayed(name) else 0.0))
        yield params
        params = dict(params)
