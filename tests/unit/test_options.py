"""The --anchor options: one record, from a command line or from keyword arguments."""

import argparse
import dataclasses
import os
import shlex
import subprocess
import sys

import pytest

from anchortp_sglang.option_values import OptionsError
from anchortp_sglang.options import AnchorOptions, add_arguments, from_kwargs, split_argv

SGLANG = [
    "--model-path",
    "m",
    "--tp=3",
    "--chunked-prefill-size",
    "-1",
    "--json-model-override-args",
    '{"a": 1}',
]


def test_without_anchor_flags_sglang_gets_its_arguments_untouched():
    assert split_argv(SGLANG) == (AnchorOptions(), SGLANG)


def test_anchor_flags_are_taken_out_wherever_they_stand():
    argv = [
        "--anchor-widths=2,1,1",
        *SGLANG[:3],
        "--anchor-linger",
        "1.5",
        *SGLANG[3:],
        "--anchor-allow-drift",
    ]
    options, rest = split_argv(argv)
    assert rest == SGLANG
    assert options == AnchorOptions(widths=(2, 1, 1), linger_s=1.5, allow_drift=True)


def test_a_flag_whose_value_may_be_left_out_takes_no_other_flag_for_it():
    options, rest = split_argv(["--anchor-allow-drift", "a.b,c.d", "--tp", "2"])
    assert (options.allow_drift, rest) == (("a.b", "c.d"), ["--tp", "2"])
    options, rest = split_argv(["--anchor-allow-drift", "--tp", "2"])
    assert (options.allow_drift, rest) == (True, ["--tp", "2"])
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    assert parser.parse_args(["--anchor-allow-drift", "a.b,c.d"]).anchor_allow_drift == ("a.b", "c.d")
    assert parser.parse_args(["--anchor-allow-drift"]).anchor_allow_drift is True
    assert from_kwargs({"anchor_allow_drift": ["a.b"]})[0].allow_drift == ("a.b",)


def test_every_flag_reaches_its_field():
    line = (
        "--anchor-min-devices 2 --anchor-linger 3 --anchor-run-dir /run/a"
        " --anchor-hang-timeout 4 --anchor-recovery-deadline 5 --anchor-max-body-mib 0.5 --anchor-allow-injection"
        " --anchor-allow-journals --anchor-allow-drift --anchor-device-gib 6 --anchor-kv-mirror host"
        " --anchor-kv-mirror-gib 1.5 --anchor-kv-mirror-gbps 2"
        " --anchor-standby cold --anchor-start-devices 3,0 --anchor-rejoin auto --anchor-change-gbps 0.5"
        " --anchor-overlap on --anchor-share-gpus"
    )
    options, rest = split_argv(shlex.split(line))
    assert rest == []
    expected = (None, False, 2, 3.0, "/run/a", 4.0, 5.0, 0.5, True, True, True, 6.0, "host", 1.5, 2.0)
    expected += ("cold", (0, 3), "auto", 0.5, "on", True)
    assert dataclasses.astuple(options) == expected
    assert split_argv(["--anchor-rotate-heads"])[0].rotate_heads
    assert split_argv(["--anchor-widths", "1,1"])[0].widths == (1, 1)
    assert split_argv(["--anchor-start-devices", "available"])[0].start_devices == "available"


def test_the_last_of_two_flags_wins_as_in_argparse():
    assert split_argv(["--anchor-linger", "1", "--anchor-linger=2"])[0].linger_s == 2.0


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        ("--anchor-width 2,1", "unknown option --anchor-width; did you mean --anchor-widths?"),
        ("--anchor-zzz", "unknown option --anchor-zzz; known: --anchor-widths"),
        ("--anchor", "unknown option --anchor"),
        ("--anchor-widths", "--anchor-widths needs a value"),
        ("--anchor-linger --tp 4", "--anchor-linger needs a value"),
        ("--anchor-linger=", "--anchor-linger needs a value"),
        ("--anchor-linger soon", "takes SECONDS; got 'soon'"),
        ("--anchor-linger nan", "of at least 0; got nan"),
        ("--anchor-linger -1", "of at least 0; got -1"),
        ("--anchor-hang-timeout 0", "above 0; got 0"),
        ("--anchor-recovery-deadline inf", "above 0; got inf"),
        ("--anchor-widths 2,0,1", "whole numbers above 0"),
        ("--anchor-widths 2,1.5", "takes N,N,...; got '2,1.5'"),
        ("--anchor-rotate-heads --anchor-widths 2,1,1", "exclude each other"),
        ("--anchor-min-devices 0", "at least 1; got 0"),
        ("--anchor-allow-drift=a,", "takes symbols of SGLang with commas between them; got ('a', '')"),
        ("--anchor-allow-drift=", "needs a value: --anchor-allow-drift [SYMBOL,...]"),
        ("--anchor-rotate-heads=yes", "is a switch and takes no value"),
        ("--anchor-standby hot", "takes off, cold or warm"),
        ("--anchor-kv-mirror disk", "takes off or host; got 'disk'"),
        ("--anchor-kv-mirror-gib 0", "above 0; got 0"),
        ("--anchor-kv-mirror-gbps inf", "above 0; got inf"),
        ("--anchor-change-gbps 0", "above 0; got 0"),
        ("--anchor-start-devices some", "0,1,3, or available; got 'some'"),
        ("--anchor-max-body-mib 0", "above 0; got 0"),
        ("--anchor-run-dir /" + "x" * 100, "too long for the Unix sockets"),
    ],
)
def test_a_bad_flag_is_refused_with_its_name_and_what_it_takes(argv, told):
    with pytest.raises(OptionsError, match="--anchor") as error:
        split_argv(argv.split())
    assert told in str(error.value)


def test_help_shows_every_option_in_a_group_of_its_own():
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    text = parser.format_help()
    assert "\nanchortp:\n" in text
    fields = dataclasses.fields(AnchorOptions)
    assert all(field.metadata["flag"] in text for field in fields)
    assert "(default: 30.0)" in text


def test_engine_keywords_go_by_field_or_flag_name():
    options, rest = from_kwargs(
        {"model_path": "m", "anchor_widths": [2, 1], "anchor_linger": 7, "anchor_hang_timeout_s": 8}
    )
    assert rest == {"model_path": "m"}
    assert options == AnchorOptions(widths=(2, 1), linger_s=7, hang_timeout_s=8)


@pytest.mark.parametrize(
    ("kwargs", "told"),
    [
        ({"anchor_width": (1,)}, "did you mean anchor_widths?"),
        ({"anchor_linger": 1, "anchor_linger_s": 1}, "given twice"),
        ({"anchor_widths": "two"}, "whole numbers"),
        ({"anchor_min_devices": True}, "at least 1; got True"),
    ],
)
def test_a_bad_engine_keyword_is_refused(kwargs, told):
    with pytest.raises(OptionsError) as error:
        from_kwargs(kwargs)
    assert told in str(error.value)


def test_options_that_contradict_tp_size_are_refused():
    AnchorOptions(widths=(2, 1, 1), min_devices=3).check_tp_size(3)
    with pytest.raises(OptionsError, match=r"widths to 3 devices, but --tp-size is 4"):
        AnchorOptions(widths=(2, 1, 1)).check_tp_size(4)
    with pytest.raises(OptionsError, match="more than the 2 devices"):
        AnchorOptions(min_devices=3).check_tp_size(2)


def test_a_relative_run_directory_is_made_absolute_since_anchors_change_theirs():
    assert AnchorOptions(run_dir="run").run_dir == os.path.join(os.getcwd(), "run")


def test_the_package_and_its_options_import_neither_sglang_nor_torch():
    code = (
        "import sys, anchortp_sglang, anchortp_sglang.options, anchortp_sglang.admission.checks, anchortp_sglang.cli;"
        "print(sorted({'sglang', 'torch', 'transformers', 'zmq'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_an_unknown_name_of_the_package_is_an_attribute_error():
    import anchortp_sglang

    with pytest.raises(AttributeError, match="no attribute 'Motor'"):
        _ = anchortp_sglang.Motor
