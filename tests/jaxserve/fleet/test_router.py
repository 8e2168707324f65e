"""The router of a model's folder."""

import shutil
import threading
import time

import pytest

from jaxserve import SamplingParams
from jaxserve.checkpoints import hf
from jaxserve.fleet.instance import Local
from jaxserve.fleet.router import RouterOptions, route
from jaxserve.fleet.worker import Worker
from jaxserve.identity import digest
from jaxserve.layers.config import Config
from tests.jaxserve.fleet.fakes import about, identity, said
from tests.jaxserve.fleet.test_control import SOON, TOKEN, Talker


@pytest.fixture
def bare_folder(tiny_folder, tmp_path):
    """A model without its weights."""
    for name in ("config.json", "tokenizer.json"):
        shutil.copy(tiny_folder / name, tmp_path)
    return tmp_path


def until(condition):
    end = time.monotonic() + SOON
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def test_a_router_needs_no_weights_and_when_it_is_closed_its_instance_notices_and_nothing_of_it_is_left(bare_folder):
    before, told, lines = set(threading.enumerate()), [], []
    llm = route(str(bare_folder), 128, RouterOptions(token=TOKEN, period=0.02), told.append)
    host, _, port = told[0].removeprefix("instances join at ").rpartition(":")
    engine = Talker()
    its = identity()._replace(config=digest(Config.from_hf(hf.read_json(bare_folder))))
    local = Local(engine, about("D1", "decode", identity=its))
    worker = Worker(local, (host, int(port)), TOKEN, lines.append)
    thread = threading.Thread(target=worker.run)
    thread.start()
    try:
        until(lambda: llm.engine.ready)
        (result,) = llm.generate([[5, 7]], SamplingParams(max_tokens=4, ignore_eos=True, seed=3))
        assert tuple(result.outputs[0].token_ids) == said((5, 7), 3, 4)
        llm.close()
        until(lambda: lines[-1].startswith("the router is gone"))
    finally:
        worker.leave()
        thread.join(SOON)
        local.close()
        llm.close()
    until(lambda: set(threading.enumerate()) <= before)
