"""The small languages of φ's settings: what they mean, and what they refuse."""

from __future__ import annotations

import dataclasses

import pytest

from basisadapt import InputError
from basisadapt.phi.dense_gradient import DenseGradient
from basisadapt.phi.notation import Amplitudes, Bandwidth, Gain, Rate
from basisadapt.phi.settings import PhiSettings


@pytest.mark.parametrize(
    ("parsed", "expected"),
    [
        (Gain.parse(30.0), Gain("fixed", 30.0)),
        (Gain.parse("learned:30"), Gain("learned", 30.0)),
        (Gain.parse("normalised:2e-1"), Gain("normalised", 0.2)),
        (Rate.parse(0.0), Rate(0.0)),
        (Rate.parse("absolute:0.03"), Rate(0.03, absolute=True)),
        (Amplitudes.parse("zero"), Amplitudes("zero")),
        (Amplitudes.parse("fan_in"), Amplitudes("fan_in")),
        (Amplitudes.parse("normal:0"), Amplitudes("normal", 0.0)),
        (Bandwidth.parse(1e6, 2.0), Bandwidth(1e6, 1e6)),
        (Bandwidth.parse("nyquist", 2.0), Bandwidth(2.0, 2.0)),
        (Bandwidth.parse("depth:0.5:2", 2.0), Bandwidth(0.5, 2.0, by_depth=True)),
        (DenseGradient.parse("fp8"), DenseGradient("fp8")),
        (DenseGradient.parse("sketch:999"), DenseGradient("sketch", 999)),
    ],
)
def test_what_a_text_means(parsed, expected):
    assert parsed == expected
    with pytest.raises(dataclasses.FrozenInstanceError):
        parsed.kind = "other"


def test_a_rate_beside_the_base_rate():
    assert Rate.parse(0.5).beside(0.01) == 0.005
    assert Rate.parse("absolute:0.5").beside(0.01) == 0.5


def test_a_bandwidth_over_the_depth():
    by_depth = Bandwidth.parse("depth:1:3", 2.0)
    assert [by_depth.at(depth) for depth in (0.0, 0.25, 1.0)] == [1.0, 1.5, 3.0]
    assert {Bandwidth.parse(0.1, 2.0).at(depth) for depth in (0.0, 0.3, 1.0)} == {0.1}


REFUSED = {
    "gain": [0.0, 1e7, float("nan"), "", ":5", "5", "None:5", "learned", "learned:", "learned:fast", "learned:1:2"],
    "transfer_lr": [-0.5, float("inf"), "", ":1", "1", "ratio:2", "absolute", "absolute:-1", "absolute:nan"],
    "amplitude_init": ["", "normal", "normal:-1", "normal:nan", "normal:1e7", "zero:1", "identity:", "ones"],
    "omega_init": [0.0, "", "2", "depth", "depth:1", "depth:0:1", "depth:1:0", "1:2", "nyquist:2", "depth:1:2:3"],
    "dense_gradient": ["", "exact:2", "fp16", "sketch", "sketch:1", "sketch:2.0", "sketch:1000", "sketch:x"],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name in REFUSED for value in REFUSED[name]])
def test_what_a_setting_refuses_with_its_name(name, value):
    with pytest.raises(InputError, match=f"^{name} must be .*, got "):
        PhiSettings(**{name: value})


def test_one_function_has_no_nyquist_bandwidth():
    with pytest.raises(InputError, match='"nyquist" with num_basis > 1'):
        PhiSettings(omega_init="nyquist", num_basis=1)


def test_a_setting_stays_the_text_that_was_written():
    settings = PhiSettings(gain="learned:30", transfer_lr="absolute:1e-2", omega_init="depth:1:2")
    assert (settings.gain, settings.transfer_lr, settings.omega_init) == ("learned:30", "absolute:1e-2", "depth:1:2")
    assert settings.gain_form == Gain("learned", 30.0)
