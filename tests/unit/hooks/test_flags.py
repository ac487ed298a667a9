"""A command line is understood before SGLang is imported, as SGLang will understand it."""

import pytest

from anchortp_sglang.hooks.flags import given_flags, installed_flags, known_flags


def test_the_table_is_that_of_the_installed_sglang():
    """Renew it with ``python -m anchortp_sglang.hooks --write``."""
    assert known_flags() == installed_flags()


@pytest.mark.parametrize(
    ("argv", "given"),
    [
        ([], {}),
        (["--tp-size", "4"], {"tp_size": "4"}),
        (["--tp=4", "--tp", "2"], {"tp_size": "2"}),
        (["--tensor-par", "4"], {"tp_size": "4"}),
        (["--mem-frac", "0.8", "--model", "/m"], {"mem_fraction_static": "0.8", "model_path": "/m"}),
        (["--disable-overlap", "--host", "::1"], {"disable_overlap_schedule": True, "host": "::1"}),
        (["--enable-tf32-matmul"], {"enable_tf32_matmul": True}),
        (["--no-enable-tf32-matmul"], {"enable_tf32_matmul": False}),
        (["--cuda-graph-bs-decode", "1", "2", "--port", "1"], {"cuda_graph_bs_decode": ["1", "2"], "port": "1"}),
        (["--json-model-override-args", '{"a": "--b"}'], {"json_model_override_args": '{"a": "--b"}'}),
        (["-h"], {"help": True}),
        (["--of-a-fork", "3", "--port", "1"], {"port": "1"}),
    ],
)
def test_flags_mean_what_they_mean_to_sglang(argv, given):
    assert given_flags(argv) == given


def test_the_command_line_wins_over_the_configuration_file(tmp_path):
    file = tmp_path / "server.yaml"
    file.write_text("tp: 3\nmodel-path: /m\nenable-metrics: true\nsleep-on-idle: false\ncuda-graph-bs-decode: [1, 2]\n")
    given = given_flags(["--config", str(file), "--tp-size", "2"])
    assert given == {"tp_size": "2", "model_path": "/m", "enable_metrics": True, "cuda_graph_bs_decode": ["1", "2"]}


@pytest.mark.parametrize(
    ("argv", "complaint"),
    [
        (["--disable"], "ambiguous option: --disable could match"),
        (["--tp"], "expected one argument"),
        (["--tp", "--port", "1"], "expected one argument"),
        (["--config"], "No config file"),
        (["--config", "/nowhere.yaml"], "--config /nowhere.yaml cannot be used: .*not found"),
    ],
)
def test_what_sglang_would_not_accept_is_refused(argv, complaint):
    with pytest.raises(ValueError, match=complaint):
        given_flags(argv)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("a: [1,", "--config .*server.yaml cannot be used"),
        ("1: 2", "--config .*server.yaml cannot be used"),
        ("[1, 2]", "must contain a dictionary"),
        ("anchor-linger: 3", "--anchor-linger cannot be in a --config file"),
    ],
)
def test_a_configuration_file_that_cannot_be_used_is_refused(tmp_path, text, complaint):
    file = tmp_path / "server.yaml"
    file.write_text(text)
    with pytest.raises(ValueError, match=complaint):
        given_flags(["--config", str(file)])
