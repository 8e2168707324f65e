"""What `jaxserve up` starts: commands that `jaxserve serve` understands."""

import signal

import pytest
import typer
from typer.testing import CliRunner

from jaxserve.cli.fleet import GROUPS, check_effect
from jaxserve.cli.main import app
from jaxserve.fleet import children as module
from jaxserve.parallel.errors import RequestError


@pytest.fixture
def started(monkeypatch):
    """What each process is started with, as `jaxserve serve` reads it, by its name; and their environment."""
    found = {}

    class Recorder:
        def __init__(self, environment, tell):
            found["environment"] = environment

        def run(self, router, instances):
            found["router"] = read(router)
            found.update({name: read([*command, "--router", "here:7"]) for name, command in instances.items()})
            return 0

    monkeypatch.setattr(module, "Children", Recorder)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    return found


def read(command):
    assert command[1:4] == ["-m", "jaxserve", "serve"]
    context = typer.main.get_command(app).commands["serve"].make_context("serve", list(command[4:]))
    given = [name for name in context.params if context.get_parameter_source(name).name == "COMMANDLINE"]
    return context.params | {"given": given}


def up(*words):
    result = CliRunner().invoke(app, ["up", *words])
    assert result.exit_code == 0, result.output


def test_each_process_has_a_role_and_instances_a_name_of_their_own(started):
    up("--prefill", "2", "--decode", "1", "--port", "0", "--fleet-token", "s", "--api-key", "k", "--mesh", "1x2")
    environment, router = started.pop("environment"), started.pop("router")
    assert environment == {"JAXSERVE_FLEET_TOKEN": "s", "JAXSERVE_API_KEY": "k"}
    assert (router["role"], router["port"], router["control_port"], router["mesh"]) == ("router", 0, 0, None)
    assert {name: (its["role"], its["name"], its["mesh"], its["router"]) for name, its in started.items()} == {
        "prefill-1": ("prefill", "prefill-1", "1x2", "here:7"),
        "prefill-2": ("prefill", "prefill-2", "1x2", "here:7"),
        "decode-1": ("decode", "decode-1", "1x2", "here:7"),
    }


def test_all_have_the_same_model_and_sizes(started):
    up("some/model", "--max-model-len", "64", "--dtype", "bfloat16", "--quantization", "int8", "--cache-gb", "0.5")
    del started["environment"]
    wanted = {"model": "some/model", "max_model_len": 64}
    assert all({name: its[name] for name in wanted} == wanted for its in started.values())
    del started["router"]  # it has no engine
    wanted = {"dtype": "bfloat16", "quantization": "int8", "cache_gb": 0.5}
    assert all({name: its[name] for name in wanted} == wanted for its in started.values())


def test_what_each_is_given_has_an_effect_there_and_ends_it_with_this_process(started):
    up("--served-model-name", "a", "--served-model-name", "b", "--api-key", "k", "--api-key", "l", "--mesh", "1x2")
    assert started.pop("environment")["JAXSERVE_API_KEY"] == "k l"
    assert started["router"]["served_model_name"] == ["a", "b"]
    for its in started.values():
        check_effect(its["role"], its["given"])
        assert its["end_with_stdin"]


def test_instances_share_the_folders_of_what_is_kept(started):
    kept = {
        "context_cache": "./pages,redis://here:1", "context_cache_memory_gb": 0.25, "context_cache_disk_gb": 2.0,
        "context_cache_shared_gb": 3.0, "model_cache": "./weights",
    }  # fmt: skip
    words = [word for name, value in kept.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    up("--prefill", "2", *words)
    router = started.pop("router")
    del started["environment"]
    assert len(started) == 3
    assert all({name: its[name] for name in kept} == kept for its in started.values())
    assert router["context_cache"] is router["model_cache"] is None  # it has no weights, and no pages


def test_without_those_options_nothing_is_kept(started):
    up()
    assert started["decode-1"]["context_cache"] is started["decode-1"]["model_cache"] is None


@pytest.mark.parametrize(
    ("role", "option", "message"),
    [
        ("router", "cache_gb", "--cache-gb has no effect with --role router: it is for who has an engine; give it to"),
        ("prefill", "max_num_queued", "--max-num-queued has no effect with --role prefill: it is for who is asked by"),
        ("decode", "control_port", "--control-port has no effect with --role decode: it is for --role router"),
        (None, "control_port", "--control-port has no effect without --role: it is for --role router"),
        ("router", "name", "--name has no effect with --role router: it is for --role prefill and --role decode"),
        ("router", "loadable", "--loadable has no effect with --role router: a fleet serves one model"),
        (None, "fleet_token", "--fleet-token has no effect without --role: it is for a part of a fleet"),
    ],
)
def test_an_option_without_effect_in_a_role_is_named(role, option, message):
    with pytest.raises(RequestError) as caught:
        check_effect(role, ["model", option])
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize("command", [["up"], ["serve"], ["serve", "--role", "decode"]])
def test_a_size_of_what_there_is_not_is_named(command):
    result = CliRunner().invoke(app, [*command, "--context-cache-disk-gb", "3"])
    assert "--context-cache-disk-gb has no effect without --context-cache" in str(result.exception)


def test_of_every_option_it_is_known_in_which_roles_it_has_an_effect():
    everywhere = {"model", "host", "max_model_len", "drain_timeout", "log_requests", "role", "router", "end_with_stdin"}
    named = [name for group in GROUPS for name in group.names.split()]
    options = {option.name for option in typer.main.get_command(app).commands["serve"].params}
    assert len(named) == len(set(named)) and set(named) | everywhere == options - {"help"}


def test_the_command_says_which_option_it_was():
    result = CliRunner().invoke(app, ["serve", "--role", "router", "--fleet-token", "s", "--mesh", "1x2"])
    assert "--mesh has no effect with --role router" in str(result.exception)
