"""Feed-forward layers: one network for all tokens, or a mixture of experts (arXiv:2412.19437, section 2.1)."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxserve.layers.config import Config, Experts
from jaxserve.layers.dims import AnyArray, Leaf
from jaxserve.layers.linear import each_by_own, einsum, matvec, multiplies_rows, quantized_like, two_rows
from jaxserve.parallel.dispatch import combine, dispatch, rank_in_group
from jaxserve.parallel.placement import Routes
from jaxserve.parallel.qarray import QArray, quantize_rows
from jaxserve.parallel.ranks import Ranks
from jaxserve.parallel.sharding import Param

ROWS = 24
"""Rows of INT8 that are run together; what they are on the way stays in a cache."""


TILE = 16
"""Rows that a product of INT8 computes together."""

Plan = Callable[["Mlp", Leaf, Array, Any], Array]
"""Gives `[t, k, d]`, what each token gets from each of its experts `[t, k]`, not yet weighted."""


class Mlp(NamedTuple):
    """Gated feed-forward weights; of experts, with a leading axis `e`."""

    w_gate: Leaf  # f d   gate_proj
    w_up: Leaf  # f d     up_proj
    w_down: Leaf  # d f   down_proj


class Moe(NamedTuple):
    """A mixture of experts."""

    w_router: Leaf  # e d          gate
    bias: Leaf | None  # e         gate.e_score_correction_bias: selects, and never weighs (float32)
    experts: Mlp  # e f d, e d f   experts.{e}
    shared: Mlp | None  # f d      shared_experts: visited by every token; None: there is none, or it is in `experts`
    routes: Routes | None = None  # which of `experts` are which, where these are spread over ranks: x f d, x d f


class Routing(NamedTuple):
    """Where tokens go."""

    experts_tk: Int[Array, "t k"]  # e, one more than the last, is none
    weights_tk: Float[Array, "t k"]  # float32


class Spread(NamedTuple):
    """Room for experts on all ranks together.

    The shared expert may be among them, cut into as many as have the width of a routed one; their numbers come last.
    """

    slots: int  # x
    replicas: int  # m, of an expert at most
    shared: int  # experts that every token visits; 0: each rank computes them for its own tokens

    def routes(self, experts: int) -> Routes:
        """The tree of `Param` of a mixture's routes."""
        experts += self.shared
        return Routes(Param((experts, self.replicas), (None, None), jnp.int32), Param((experts,), (None,), jnp.int32))


def mlp_params(width: int, hidden: int, dtype) -> Mlp:
    up = Param((hidden, width), ("f", "d"), dtype, std=width**-0.5)
    return Mlp(up, up, Param((width, hidden), ("d", "f"), dtype, std=hidden**-0.5))


def moe_params(cfg: Config, moe: Experts, dtype, spread: Spread | None = None) -> Moe:
    """The tree of `Param` of a mixture; over ranks, if they have so much room."""
    e, f, d = moe.count, moe.width, cfg.width
    x, axis = (spread.slots, "x") if spread else (e, "e")
    up = Param((x, f, d), (axis, "f", "d"), dtype, std=d**-0.5)
    return Moe(
        w_router=Param((e, d), ("e", "d"), dtype, std=d**-0.5),
        bias=Param((e,), ("e",), jnp.float32) if moe.router == "sigmoid" else None,
        experts=Mlp(up, up, Param((x, d, f), (axis, "d", "f"), dtype, std=f**-0.5)),
        shared=mlp_params(d, moe.shared_width, dtype) if moe.shared_width and not (spread and spread.shared) else None,
        routes=spread.routes(e) if spread else None,
    )


@jax.named_scope("mlp")
def mlp(p: Mlp, x_td: Leaf, dtype: Any = None) -> Float[Array, "t d"]:
    """The network of each row, in their dtype; of rows that are quantized already, in the one given."""
    dtype = dtype or x_td.dtype
    rows_td = _rounded_once(p, x_td)
    gate_tf, up_tf = (einsum("td,fd->tf", rows_td, w, dtype) for w in (p.w_gate, p.w_up))
    return einsum("tf,df->td", jax.nn.silu(gate_tf) * up_tf, p.w_down)


def _rounded_once(p: Mlp, x_td: Leaf) -> Leaf:
    """Rows as the network's first two products need them; if these are unlike, each rounds its own."""
    kinds = [w.scale.shape[-1] if isinstance(w, QArray) else None for w in (p.w_gate, p.w_up)]
    return x_td if isinstance(x_td, QArray) or kinds[0] != kinds[1] else quantized_like(p.w_gate, x_td)


@jax.named_scope("moe")
def moe(
    p: Moe, x_td: Float[Array, "t d"], valid_t: Bool[AnyArray, " t"], cfg: Experts, ranks: Ranks | None = None
) -> tuple[Float[Array, "t d"], Int[Array, " e"]]:
    """The weighted sum of the chosen experts, plus the shared one, and how many tokens each expert got.

    Tokens that are not valid visit no routed expert. With `ranks`, inside a `shard_map`, each has its own tokens, and
    those of the experts that `p.routes` says.
    """
    routing = route(p, x_td, cfg)
    routing = routing._replace(experts_tk=jnp.where(valid_t[:, None], routing.experts_tk, cfg.count))
    load_e = jnp.zeros(cfg.count, jnp.int32).at[routing.experts_tk].add(1, mode="drop")
    if ranks is None or p.routes is None:
        y_td = mix_experts(p.experts, x_td, routing)
    else:
        y_td = mix_spread_experts(p.experts, x_td, routing, p.routes, ranks, cfg.count)
    return (y_td if p.shared is None else y_td + mlp(p.shared, x_td)), load_e


def route(p: Moe, x_td: Float[Array, "t d"], cfg: Experts) -> Routing:
    """Chooses `k` experts a token, in float32 (arXiv:2412.19437, eq. 12 to 16; arXiv:2405.04434, eq. 20 to 24).

    Experts outside the best groups can't be chosen: they get -inf, as in DeepSeek's own code. (Hugging Face gives them
    0, which differs when the biased scores of a chosen group are negative.)
    """
    exact = jax.lax.Precision.HIGHEST  # other backends would round float32 first, and choose other experts
    logits_te = jnp.einsum("td,ed->te", x_td.astype(jnp.float32), p.w_router.astype(jnp.float32), precision=exact)
    scores_te = jax.nn.sigmoid(logits_te) if cfg.router == "sigmoid" else jax.nn.softmax(logits_te, axis=-1)
    choice_te = scores_te if p.bias is None else scores_te + p.bias[None]
    if cfg.groups > 1:
        choice_te = _keep_best_groups(choice_te, cfg)
    _, experts_tk = jax.lax.top_k(choice_te, cfg.per_token)
    weights_tk = jnp.take_along_axis(scores_te, experts_tk, axis=1)
    if cfg.normalize:
        weights_tk = weights_tk / (weights_tk.sum(axis=-1, keepdims=True) + 1e-20)  # as Hugging Face: never 0/0
    return Routing(experts_tk, weights_tk * cfg.weight_scale)


def _keep_best_groups(choice_te: Array, cfg: Experts) -> Array:
    """-inf for experts outside the best groups: those with the best pair of experts (sigmoid) or expert (softmax)."""
    grouped = choice_te.reshape(choice_te.shape[0], cfg.groups, -1)
    best = min(2 if cfg.router == "sigmoid" else 1, grouped.shape[-1])
    scores = jax.lax.top_k(grouped, best)[0].sum(axis=-1)
    _, chosen = jax.lax.top_k(scores, cfg.groups_per_token)
    kept = jax.nn.one_hot(chosen, cfg.groups, dtype=bool).any(axis=1)
    return jnp.where(kept[:, :, None], grouped, -jnp.inf).reshape(choice_te.shape)


def mix_experts(
    p: Mlp, x_td: Leaf, routing: Routing, implementation: str | None = None, dtype: Any = None, sparse: bool = False
) -> Float[Array, "t d"]:
    """Each token's weighted sum over its experts. All implementations give the same result and drop nothing.

    Tokens `[t, d]` may be quantized already, for experts that are too; the result's `dtype` must be given then.

    "dense" runs every expert on every token, at once. "rooms" gives each room for some more than its fair share, and
    runs it on those that find room; the others are "blocks". "blocks" sorts tokens by expert and runs blocks of one
    expert each, one after another: work in proportion to the tokens. "rows", for experts in INT8 on CPU, runs each
    token by itself. None chooses by their cost; it helps to know that most choices are none (`sparse`).
    """
    plans: dict[str, Plan] = {"dense": _dense, "rooms": _rooms, "blocks": _blocks, "rows": _rows}
    if implementation is None:
        (t, k), experts = routing.experts_tk.shape, p.w_gate.shape[0]
        implementation = _cheaper(t, k, experts, all(map(multiplies_rows, p)), sparse)
    if implementation not in plans:
        raise NotImplementedError(f"implementation {implementation!r} of mix_experts; there are: {', '.join(plans)}")
    dtype = dtype or x_td.dtype
    y_tkd = plans[implementation](p, _rounded_once(p, x_td), routing.experts_tk, dtype)
    return jnp.einsum("tkd,tk->td", y_tkd, routing.weights_tk.astype(y_tkd.dtype))


def mix_spread_experts(
    p: Mlp, x_td: Float[Array, "t d"], routing: Routing, routes: Routes, ranks: Ranks, routed: int
) -> Float[Array, "t d"]:
    """`mix_experts` where each rank has some of them: tokens go there and come back.

    Experts with numbers from `routed` on are shared ones: every token visits them.
    """
    here = p.w_gate.shape[0]
    routing = _with_shared(routing, routed, shared=routes.slots_em.shape[0] - routed)
    came, handle = dispatch(x_td, physical(routing.experts_tk, routes, ranks, routed), here, ranks)
    alone_i1 = Routing(came.slots_i[:, None], jnp.ones((len(came.slots_i), 1)))
    y_id = mix_experts(p, came.rows_id, alone_i1, dtype=x_td.dtype, sparse=True)
    return combine(y_id, routing.weights_tk, handle, ranks)


def _with_shared(routing: Routing, routed: int, shared: int) -> Routing:
    """The choices with those that every token makes; those of `routed`, which is none, move behind the shared ones."""
    t, _ = routing.experts_tk.shape
    none_tk = routing.experts_tk == routed
    all_tk = jnp.broadcast_to(routed + jnp.arange(shared), (t, shared))
    all_tk = jnp.where(none_tk[:, :1], routed + shared, all_tk)
    experts_tk = jnp.concatenate([jnp.where(none_tk, routed + shared, routing.experts_tk), all_tk], axis=1)
    return Routing(experts_tk, jnp.concatenate([routing.weights_tk, jnp.ones((t, shared))], axis=1))


def physical(experts_tk: Int[Array, "t k"], routes: Routes, ranks: Ranks, routed: int) -> Int[Array, "t k"]:
    """The slot that each token visits of an expert. A number past all slots for experts that are none.

    Replicas take turns, by the token's place in the whole batch; those of shared experts, which every token visits, by
    its rank.
    """
    t, _ = experts_tk.shape
    place_t1 = (ranks.rank * t + jnp.arange(t))[:, None]
    place_tk = jnp.where(experts_tk < routed, place_t1, ranks.rank)
    turn_tk = place_tk % jnp.take(routes.count_e, experts_tk, mode="fill", fill_value=1)
    return routes.slots_em.at[experts_tk, turn_tk].get(mode="fill", fill_value=jnp.iinfo(jnp.int32).max)


def _cheaper(t: int, k: int, experts: int, by_rows: bool, sparse: bool) -> str:
    """Blocks read the experts that are visited; those of several rows three times: they copy the weights they use.

    Rows read an expert for each token; what the one before has read is in a cache. Rooms read every expert, and compute
    in full what nobody takes.
    """
    if by_rows and t * k <= 2 * experts:
        return "rows"
    if t * k < 2 * experts or (sparse and t > 32):
        return "blocks"
    return "rooms" if room(t, k, experts) < t else "dense"


def _dense(p: Mlp, x_td: Leaf, experts_tk: Array, dtype: Any) -> Array:
    gate_etf, up_etf = (einsum("td,efd->etf", two_rows(x_td), w, dtype) for w in (p.w_gate, p.w_up))
    y_etd = einsum("etf,edf->etd", jax.nn.silu(gate_etf) * up_etf, p.w_down)
    return y_etd[experts_tk, jnp.arange(x_td.shape[0])[:, None]]


def _rooms(p: Mlp, x_td: Leaf, experts_tk: Array, dtype: Any) -> Array:
    (t, k), experts, flat = experts_tk.shape, p.w_gate.shape[0], experts_tk.reshape(-1)
    size = room(t, k, experts)
    place, load_e = rank_in_group(flat, experts)
    tokens_et = jnp.full((experts, size), t).at[flat, place].set(jnp.arange(t * k) // k, mode="drop")
    x_etd = jax.tree.map(lambda part: jnp.take(part, tokens_et, axis=0, mode="fill", fill_value=0), x_td)
    gate_etf, up_etf = (einsum("etd,efd->etf", x_etd, w, dtype) for w in (p.w_gate, p.w_up))
    y_etd = einsum("etf,edf->etd", jax.nn.silu(gate_etf) * up_etf, p.w_down)
    y_tkd = y_etd.at[flat, place].get(mode="fill", fill_value=0).reshape(t, k, -1)

    def with_others() -> Array:
        others_tk = jnp.where((place < size).reshape(t, k), experts, experts_tk)
        return y_tkd + _blocks(p, x_td, others_tk, dtype, blocks_beyond(t, k, experts))  # one of the two is 0

    return jax.lax.cond((load_e > size).any(), with_others, lambda: y_tkd)


def room(t: int, k: int, experts: int) -> int:
    """Tokens of an expert that find room: a third more than its fair share, in whole tiles; at most all."""
    return min(t, -(-4 * t * k // (3 * experts * TILE)) * TILE)


def blocks_beyond(t: int, k: int, experts: int) -> int:
    """How many blocks hold the tokens that find no room, whatever the routing.

    An expert has `n` of them only if it has more tokens than its room, and `n - 1` blocks.
    """
    return t * k // min(room(t, k, experts) + 1, block_shape(t, k, experts)[0])


def block_shape(t: int, k: int, experts: int) -> tuple[int, int]:
    """Rows of a block, and how many blocks hold any routing of `t` tokens to `k` of `experts` each.

    A block is about as large as an expert's fair share; every expert that is visited wastes less than one block.
    """
    size = min(64, 1 << ((t * k - 1) // experts).bit_length())
    return size, min(t * k, t * k // size + min(experts, t * k))


def _blocks(p: Mlp, x_td: Leaf, experts_tk: Array, dtype: Any, count: int | None = None) -> Array:
    (t, k), experts = experts_tk.shape, p.w_gate.shape[0]
    size, enough = block_shape(t, k, experts)
    count = enough if count is None else count
    row_tk, block_experts = assign_blocks(experts_tk, experts, size, count)
    tokens = jnp.full(count * size, t).at[row_tk].set(jnp.arange(t)[:, None], mode="drop").reshape(count, size)
    alone = size == 1 and not any(isinstance(w, QArray) for w in p)

    def run(block: tuple[Array, Array]) -> Array:
        tokens, expert = block

        def visit() -> Array:
            rows = jax.tree.map(lambda part: jnp.take(part, tokens, axis=0, mode="fill", fill_value=0), x_td)
            weights = jax.tree.map(lambda w: jax.lax.dynamic_index_in_dim(w, expert, keepdims=False), p)
            return _mlp_of_one(weights, rows[0])[None] if alone else mlp(weights, rows, dtype)

        return jax.lax.cond(expert < experts, visit, lambda: jnp.zeros((size, x_td.shape[1]), dtype))

    rows = jax.lax.map(run, (tokens, block_experts)).reshape(count * size, -1)
    return jnp.take(rows, row_tk, axis=0, mode="fill", fill_value=0)


def _rows(p: Mlp, x_td: Leaf, experts_tk: Array, dtype: Any) -> Array:
    (t, k), experts, flat = experts_tk.shape, p.w_gate.shape[0], experts_tk.reshape(-1)
    size = min(ROWS, t * k)
    order_i = jnp.pad(jnp.argsort(flat), (0, -flat.size % size), constant_values=flat.size)  # no expert comes last

    def run(n: Any, y_id: Array) -> Array:
        chosen_i = jax.lax.dynamic_slice_in_dim(order_i, n * size, size)
        experts_i = jnp.take(flat, chosen_i, mode="fill", fill_value=experts)
        rows_id = jax.tree.map(lambda part: jnp.take(part, chosen_i // k, axis=0, mode="clip"), x_td)
        visited_i = jnp.minimum(experts_i, experts - 1)
        gate_if, up_if = (each_by_own(rows_id, w, visited_i, dtype) for w in (p.w_gate, p.w_up))
        found_id = each_by_own(quantize_rows(jax.nn.silu(gate_if) * up_if), p.w_down, visited_i, dtype)
        return y_id.at[jnp.where(experts_i < experts, chosen_i, flat.size)].set(found_id, mode="drop")

    count = -(-(flat < experts).sum() // size)
    return jax.lax.fori_loop(0, count, run, jnp.zeros((flat.size, x_td.shape[1]), dtype)).reshape(t, k, -1)


def _mlp_of_one(p: Mlp, x_d: Float[Array, " d"]) -> Float[Array, " d"]:
    return matvec(jax.nn.silu(matvec(x_d, p.w_gate)) * matvec(x_d, p.w_up), p.w_down)


def assign_blocks(experts_tk: Int[Array, "t k"], experts: int, size: int, count: int) -> tuple[Array, Array]:
    """A row for each (token, choice), `[t, k]`, such that the `size` rows of a block have one expert: `[count]`.

    Blocks that nothing fills have the expert `experts`, which is none. Choices of that one get rows of such blocks, or
    rows past the last.
    """
    flat = experts_tk.reshape(-1)
    if size == 1:
        return jnp.arange(flat.size).reshape(experts_tk.shape), flat
    place, load_e = rank_in_group(flat, experts)
    ends_e = jnp.cumsum(-(-load_e // size))
    row_of_first = jnp.pad(ends_e * size, (1, 0))
    row_tk = (row_of_first[flat] + place).reshape(experts_tk.shape)
    return row_tk, jnp.searchsorted(ends_e, jnp.arange(count), side="right")
