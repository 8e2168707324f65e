"""Which expert lies in which physical slot, so that no device has much more work than the others.

A placement of one layer is `slots_x`: the expert in each slot, or a negative number where a slot holds none. Slot i
lies on rank i // (x // ranks). An expert in several slots has replicas, and they share its tokens. All this is NumPy on
the host; a device is given `Routes`, whose shapes no placement changes, so that another one compiles nothing.
The letter t, elsewhere of tokens, is of slices of time.
"""

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int, Num

from jaxserve.parallel.errors import ShardingError


def eplb(load_le: Num[np.ndarray, "l e"], slots: int, groups: int, nodes: int, ranks: int) -> Int[np.ndarray, "l x"]:
    """DeepSeek's placement, for the mean load (github.com/deepseek-ai/EPLB, README).

    If the groups divide over the nodes, each goes to one node as a whole, so that tokens which visit few groups visit
    few nodes; otherwise groups and nodes do not count. An expert may have two replicas on one rank, where one would do.
    Of equal loads that with the lower number comes first.
    """
    if groups % nodes:
        groups, nodes = 1, 1
    experts = load_le.shape[1]
    _divide(experts, "experts", groups, "groups")
    _divide(slots, "slots", ranks, "ranks")
    _divide(ranks, "ranks", nodes, "nodes")
    if slots < experts:
        raise ShardingError(f"{experts} experts do not fit into {slots} slots: each needs one")
    return np.stack([_node_by_node(load_e, slots, groups, nodes, ranks) for load_e in load_le.astype(float)])


def _divide(count: int, what: str, parts: int, among: str) -> None:
    if count % parts:
        raise ShardingError(f"{count} {what} do not divide over {parts} {among}; {count + -count % parts} would")


def _node_by_node(
    load_e: Float[np.ndarray, "e"], slots: int, groups: int, nodes: int, ranks: int
) -> Int[np.ndarray, "x"]:
    """Packs groups into nodes; then in each node replicates the experts it has, and packs the replicas into ranks."""
    members, placed = np.arange(load_e.size).reshape(groups, -1), []
    for own in _pack(load_e.reshape(groups, -1).sum(1), nodes):
        experts = members[own].ravel()
        held = experts[_replicate(load_e[experts], slots // nodes)]
        share = load_e[held] / np.bincount(held)[held]
        placed.append(held[_pack(share, ranks // nodes)].ravel())
    return np.concatenate(placed)


def _replicate(load_e: Float[np.ndarray, "e"], slots: int) -> Int[np.ndarray, "x"]:
    """Every expert once, in order, and then, one at a time, the one whose replicas have most to do."""
    held, count_e = list(range(load_e.size)), np.ones(load_e.size)
    while len(held) < slots:
        held.append(int(np.argmax(load_e / count_e)))
        count_e[held[-1]] += 1
    return np.array(held)


def _pack(load: Float[np.ndarray, "items"], packs: int) -> Int[np.ndarray, "packs room"]:
    """The items in each pack, equally many: the heaviest first, to the lightest pack with room."""
    room = load.size // packs
    if room == 1:  # nothing to balance; DeepSeek's leaves the order too
        return np.arange(packs)[:, None]
    held, total = [[] for _ in range(packs)], [0.0] * packs
    for item in np.argsort(-load, kind="stable").tolist():
        _, pack = min((total[p], p) for p in range(packs) if len(held[p]) < room)
        held[pack].append(item)
        total[pack] += float(load[item])
    return np.array(held)


def time_sliced(count_lte: Num[np.ndarray, "l t e"], extra: int, ranks: int) -> Int[np.ndarray, "l x"]:
    """The placement of xDeepServe, for the hottest expert of each time slice (arXiv:2508.02520, section 4.5).

    What balances the mean may leave each minute with a hot expert of its own. Here every expert has a home, spread in
    order and as evenly as ranks allow, and `extra` slots, which fill the ranks up, take replicas of those that are
    hottest in some slice. Homes never move: the next such placement is one round away, which writes extra slots only.

    What the paper leaves open: an expert has no more replicas than there are ranks. The load of a replica is that of
    its expert, over all slices, divided by the replicas. It goes to a rank that has the expert only if no other has
    room. Of equal ones that with the lower number comes first.
    """
    experts = count_lte.shape[2]
    _divide(experts + extra, f"slots ({experts} experts and {extra} extra)", ranks, "ranks")
    if extra > experts * (ranks - 1):
        raise ShardingError(
            f"{extra} extra slots are more than {experts} experts can use on {ranks} ranks: one of each"
        )
    return np.stack([_place(count_te.sum(0), _split(count_te, extra, ranks), ranks) for count_te in count_lte])


def _split(count_te: Num[np.ndarray, "t e"], extra: int, ranks: int) -> Int[np.ndarray, "e"]:
    """Replicas of each expert. Each extra one is tried with the hottest of every slice, and goes where it helps most.

    A replica of any other expert would lower the maximum of no slice. The best of one step is not always the best of
    all: where two experts are equally hot in one slice, neither is split as long as one alone in another slice can be.
    """
    count_e, one = np.ones(count_te.shape[1], int), np.eye(count_te.shape[1], dtype=int)
    for _ in range(extra):
        share_te = np.where(count_e < ranks, count_te / count_e, -1)
        hottest = np.unique(share_te.argmax(1))
        _, expert = min((_peaks(count_te / (count_e + one[e])), e) for e in hottest)
        count_e[expert] += 1
    return count_e


def _peaks(share_te: Float[np.ndarray, "t e"]) -> float:
    """The load of a layer as its hottest replicas see it, slice by slice."""
    return share_te.max(1).sum()


def _place(load_e: Num[np.ndarray, "e"], count_e: Int[np.ndarray, "e"], ranks: int) -> Int[np.ndarray, "x"]:
    """Every expert at home, and then the other replicas, the heaviest first, each to the rank with least to do."""
    share_e, room = load_e / count_e, count_e.sum() // ranks
    held = [home.tolist() for home in np.array_split(np.arange(load_e.size), ranks)]
    total = [float(share_e[home].sum()) for home in held]
    others = np.repeat(np.arange(load_e.size), count_e - 1)
    for expert in others[np.argsort(-share_e[others], kind="stable")].tolist():
        _, _, rank = min((expert in held[r], total[r], r) for r in range(ranks) if len(held[r]) < room)
        held[rank].append(expert)
        total[rank] += float(share_e[expert])
    return np.concatenate(held)


class Routes(NamedTuple):
    """Where the tokens of one layer go: that at position i of its batch to `slots_em[expert, i % count_e[expert]]`.

    So replicas take turns, and nobody has to ask others who is free (arXiv:2508.02520, section 4.5).
    """

    slots_em: Any  # int32 [e, m], slots in use of each expert, in order, repeated to the full width
    count_e: Any  # int32 [e], how many they are


def routes(slots_x: Int[np.ndarray, "x"], experts: int, most: int) -> Routes:
    """The routes to the slots in use; `most`, the width, has to be the same for all placements of a program."""
    count_e = replicas(slots_x, experts)
    if count_e.max() > most:
        raise ShardingError(f"expert {count_e.argmax()} has {count_e.max()} replicas, routes have room for {most}")
    by_expert = np.argsort(slots_x, kind="stable")[np.count_nonzero(slots_x < 0) :]
    first_e = np.cumsum(count_e) - count_e
    slots_em = by_expert[first_e[:, None] + np.arange(most) % count_e[:, None]]
    return Routes(slots_em.astype(np.int32), count_e.astype(np.int32))


def held(routes: Routes, slots: int) -> Int[np.ndarray, "x"]:
    """The placement that routes lead to: the inverse of `routes`."""
    slots_x = np.full(slots, -1)
    for expert, count in enumerate(routes.count_e):
        slots_x[routes.slots_em[expert, :count]] = expert
    return slots_x


def replicas(slots_x: Int[np.ndarray, "x"], experts: int) -> Int[np.ndarray, "e"]:
    """How many slots hold each expert: at least one."""
    count_e = np.bincount(slots_x[slots_x >= 0], minlength=experts)
    if count_e.size > experts:
        raise ShardingError(f"slot {slots_x.argmax()} holds expert {slots_x.max()}; there are {experts}, from 0 on")
    if not count_e.all():
        raise ShardingError(f"expert {count_e.argmin()} has no slot: its tokens would have nowhere to go")
    return count_e


def load(slots_x: Int[np.ndarray, "x"], load_te: Num[np.ndarray, "*t e"], ranks: int) -> Float[np.ndarray, "*t ranks"]:
    """Tokens for each rank if replicas share evenly, of each time slice if there are some."""
    _divide(slots_x.size, "slots", ranks, "ranks")
    share_te = load_te / replicas(slots_x, load_te.shape[-1])
    load_tx = np.where(slots_x < 0, 0.0, share_te[..., slots_x])
    return load_tx.reshape(*load_te.shape[:-1], ranks, -1).sum(-1)


def imbalance(loads: Float[np.ndarray, "*t ranks"]) -> float:
    """How much longer all take than if loads were even: the maximum over the mean, 1 at best.

    In every time slice all wait for the rank with most to do, so slices are summed up before they are divided.
    """
    return float(loads.max(-1).sum() / loads.mean(-1).sum()) if loads.any() else 1.0


class Round(NamedTuple):
    """One reconfiguration while inference goes on, in four phases (arXiv:2508.02520, section 4.5).

    Fetch the weights of `slots_x[written]` to the host; route by `disabled_x`, and let steps launched before finish;
    load the weights into the slots, which nobody uses now; route by `slots_x`.
    """

    disabled_x: np.ndarray  # the placement meanwhile: -1 in slots that are written
    written: np.ndarray  # the slots that change; where `slots_x` is negative they are just given up
    slots_x: np.ndarray  # the placement afterwards


def between(old_x: Int[np.ndarray, "x"], new_x: Int[np.ndarray, "x"]) -> tuple[Round, ...]:
    """The rounds from one placement to another, in all of which every expert has a slot in use.

    A round writes all slots that can be spared. Where experts with one slot each change places in a circle, none can;
    so slots that have their new content already and can be spared, second replicas or empty ones, are lent: each takes
    in an expert that is stuck, whose own slot is then free, until the expert has arrived where it belongs. This ends,
    for a slot that differs is helped in this way at most once; so at most three times as many are written as differ.
    With all experts in one slot each and none empty no way keeps them in use, and it is an error.
    """
    experts = int(max(old_x.max(), new_x.max())) + 1
    for slots_x in (old_x, new_x):
        replicas(slots_x, experts)  # none may come or go
    rounds, now_x, lent_x = [], old_x, np.zeros(old_x.size, bool)
    while not np.array_equal(now_x, new_x):
        ready, lend, stuck = _moves(now_x, new_x, lent_x)
        disabled_x, after_x, written = now_x.copy(), now_x.copy(), np.union1d(ready, lend)
        disabled_x[written], after_x[ready], after_x[lend] = -1, new_x[ready], now_x[stuck]
        rounds.append(Round(disabled_x, written, after_x))
        lent_x[ready], lent_x[lend], now_x = False, True, after_x
    return tuple(rounds)


class _Moves(NamedTuple):
    """What a round can do."""

    ready: np.ndarray  # slots that can get their new content
    lend: np.ndarray  # slots that have it, and can do without for a while
    stuck: np.ndarray  # slots whose experts move there


def _moves(now_x: Int[np.ndarray, "x"], new_x: Int[np.ndarray, "x"], lent_x: Bool[np.ndarray, "x"]) -> _Moves:
    """All that leaves a slot in use to every expert.

    It keeps one that stays as it is; else the lent one, since that from which it moved there is to become free; else
    the first.
    """
    wrong_x, free_x = now_x != new_x, np.ones(now_x.size, bool)
    order = np.lexsort((~lent_x, wrong_x))
    _, first = np.unique(now_x[order], return_index=True)
    free_x[order[first]] = False
    free_x |= now_x < 0
    ready, lend = np.flatnonzero(free_x & wrong_x), np.flatnonzero(free_x & ~wrong_x)
    soon_x = np.isin(now_x, new_x[ready])  # the expert is written elsewhere now, and its slot free in the next round
    stuck = np.flatnonzero(wrong_x & ~free_x & ~lent_x & ~soon_x)
    pairs = min(lend.size, stuck.size)
    if not ready.size and not pairs:
        raise ShardingError(
            f"experts {now_x[stuck].tolist()} would change places, and no slot is spare to keep them in use meanwhile:"
            " have a slot more than experts, or load the new placement while nothing runs"
        )
    return _Moves(ready, lend[:pairs], stuck[:pairs])
