import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

from jaxserve.checkpoints.embedded import train
from jaxserve.layers.config import Config
from jaxserve.layers.transformer import model_params
from jaxserve.parallel.errors import CheckpointError
from jaxserve.parallel.sharding import initialize
from tests.layers.helpers import published, raw_config
from tests.oracles import reference

run_losses = jax.jit(train.losses, static_argnums=2)

TINY = Config.tiny("deepseek_v3", num_hidden_layers=2)


def points(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / train.CURVE).read_text().splitlines()]


def saved(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def test_the_model_has_the_promised_structure_and_size():
    cfg = Config.from_hf(train.CONFIG)
    assert cfg.is_moe == (False,) + (True,) * 5
    assert (cfg.experts.count, cfg.experts.groups, cfg.experts.groups_per_token, cfg.experts.per_token) == (16, 4, 2, 4)
    assert cfg.mtp_layers == 1 and cfg.attention.query_rank
    assert sum(p.nbytes for p in jax.tree.leaves(model_params(cfg, jnp.bfloat16))) < 16e6


def test_losses_are_the_reference_s_cross_entropies(key):
    model = initialize(model_params(TINY), key)
    tokens = np.array([[3, 5, 7, 11, 13, 17, 19, 23]])
    got = run_losses(model, jnp.asarray(tokens), TINY)
    weights = published(model)
    raw = raw_config("deepseek_v3", num_hidden_layers=2)
    main = np.log(reference.softmax(reference.logits(raw, weights, tokens[0, :-2])))
    ahead = np.log(reference.softmax(reference.mtp_logits(raw, weights, tokens[0, :-1])))
    assert got.main == pytest.approx(-np.mean(main[np.arange(6), tokens[0, 1:-1]]), rel=1e-4)
    assert got.mtp == pytest.approx(-np.mean(ahead[np.arange(6), tokens[0, 2:]]), rel=1e-4)


def test_steps_lower_the_loss_and_move_the_bias_towards_balance(key, optax_promotes):
    described = model_params(TINY)
    state = train.TrainState.create(
        apply_fn=None, params=initialize(described, key), tx=train.optimizer(described, 1e-2, 400, 10)
    )
    tokens = jax.random.randint(key, (4, 18), 0, 20)
    step = jax.jit(train.train_step, static_argnums=2)
    first = run_losses(state.params, tokens, TINY)
    for _ in range(60):
        state, last = step(state, tokens, TINY)
    assert last.main < 0.7 * first.main and last.mtp < first.mtp
    assert np.abs(state.params.layers[1].ffn.bias).max() > 0


def test_balance_raises_the_bias_of_idle_experts(key):
    model = initialize(model_params(TINY), key)
    load = jnp.array([[9, 0, 3, 3, 3, 3, 2, 1]] * 2)
    bias = train.balance(model, load).mtp[0].layer.ffn.bias
    assert (np.sign(bias) == [-1, 1, 0, 0, 0, 0, 1, 1]).all()


def test_windows_are_a_function_of_the_step_and_cover_the_text_once_an_epoch():
    windows = train.Windows(np.arange(1000), length=10, batch=4)
    np.testing.assert_array_equal(windows.at(7), windows.at(7))
    epoch = [start for step in range(24) for start in windows.at(step)[:, 0]]
    assert len(set(epoch)) >= 95
    assert all((np.diff(row) == 1).all() for row in windows.at(3))


def test_a_run_saves_and_continues_where_it_stopped(run_of, tmp_path):
    for steps in (2, 4):
        run_of(tmp_path, steps)
    assert [(point["step"], point["tokens"]) for point in points(tmp_path)] == [(2, 64), (4, 128)]
    assert saved(tmp_path) == ["2", "4"]


def test_starting_at_a_checkpoint_repeats_what_follows_and_keeps_nothing_of_what_followed(run_of, tmp_path):
    run_of(tmp_path, 6)
    before = points(tmp_path)
    run_of(tmp_path, 4, start=2)
    assert saved(tmp_path) == ["2", "4"]
    assert points(tmp_path) == before[:2]
    run_of(tmp_path, 6)
    assert saved(tmp_path) == ["2", "4", "6"]
    assert points(tmp_path) == before


def test_starting_at_a_checkpoint_that_is_not_there_is_refused_and_deletes_nothing(run_of, tmp_path):
    run_of(tmp_path, 4)
    for missing in (0, 3):
        with pytest.raises(CheckpointError, match=f"no checkpoint {missing}; name one that is there: 2, 4"):
            run_of(tmp_path, 6, start=missing)
    assert saved(tmp_path) == ["2", "4"] and len(points(tmp_path)) == 2


def test_a_point_without_its_checkpoint_is_forgotten(run_of, tmp_path):
    """A run that is killed while a checkpoint is written leaves one."""
    run_of(tmp_path, 2)
    curve = tmp_path / train.CURVE
    curve.write_text(curve.read_text() + '{"step": 4, "train": 9.9}\n')
    run_of(tmp_path, 4)
    assert [point["step"] for point in points(tmp_path)] == [2, 4]
    assert points(tmp_path)[1]["train"] < 9


def test_a_checkpoint_that_orbax_does_not_save_raises(tmp_path):
    state = train.TrainState.create(apply_fn=None, params={"w": jnp.ones(3)}, tx=optax.sgd(0.1))
    none = train.Losses(jnp.float32(0), jnp.float32(0), jnp.zeros((1, 1), int))
    with ocp.CheckpointManager(tmp_path / "checkpoints") as checkpoints:
        train.save(checkpoints, train.Update(4, state, none))
        with pytest.raises(CheckpointError, match="checkpoint 2 was not saved; the newest there is 4"):
            train.save(checkpoints, train.Update(2, state, none))
