"""Scores and targets, as arrays and as files in the working directory."""

from argparse import ArgumentParser

import numpy as np
import pytest

import mml_arrayapi as mml
from mml_arrayapi.evaluation.command import add_parser

N, C = 700, 6


@pytest.fixture(scope="session")
def arrays():
    rng = np.random.default_rng(0)
    scores = rng.standard_normal((N, C)).astype(np.float32)
    target = rng.integers(0, C, N)
    scores[np.arange(N), target] += 1
    return scores, target


@pytest.fixture
def files(arrays, tmp_path, monkeypatch):
    """The scores and targets as .npy files in the working directory."""
    monkeypatch.chdir(tmp_path)
    np.save("x.npy", arrays[0])
    np.save("y.npy", arrays[1])
    return tmp_path


@pytest.fixture(scope="session")
def wanted(arrays):
    return mml.evaluate(*arrays)


@pytest.fixture
def command():
    """Run ``evaluate`` as the command line does; return the exit code."""

    def run(*arguments):
        parser = ArgumentParser()
        add_parser(parser.add_subparsers())
        parsed = parser.parse_args(["evaluate", *map(str, arguments)])
        return parsed.run(parsed)

    return run


@pytest.fixture
def fails(command, capsys):
    """Run a command that must fail with one line; return the line."""

    def run(*arguments, code=2):
        assert command(*arguments) == code
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err.count("\n") == 1
        assert captured.err.startswith("mml-arrayapi evaluate: error: ")
        return captured.err

    return run
