"""What a server or a request may not ask for. SGLang's field names and defaults are read from its source."""

import ast
import importlib.util
from pathlib import Path
from types import SimpleNamespace

import pytest

from anchortp_sglang.admission.checks import (
    UnsupportedError,
    check_custom_labels,
    check_generate_request,
    check_message,
    check_route,
    check_server_args,
)
from anchortp_sglang.admission.flags import ENVIRONMENT, FLAG_RULES
from anchortp_sglang.admission.requests import (
    REQUEST_FIELDS,
    ROUTES,
    SAMPLING_KEYS,
    SERVED_MESSAGES,
    SERVED_ROUTES,
)
from anchortp_sglang.platforms.cpu.platform import CpuPlatform
from anchortp_sglang.platforms.cuda.platform import CudaPlatform

SRT = Path(importlib.util.find_spec("sglang").submodule_search_locations[0]) / "srt"


def declared(path, class_name=None):
    """name -> literal default (None if it is no literal) of the annotated fields in a file's classes."""
    fields = {}
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.ClassDef) or class_name not in (None, node.name):
            continue
        for statement in node.body:
            if isinstance(statement, ast.AnnAssign):
                is_literal = isinstance(statement.value, (ast.Constant, ast.UnaryOp))
                fields[statement.target.id] = ast.literal_eval(statement.value) if is_literal else None
    return fields


@pytest.fixture(scope="module")
def defaults():
    fields = {}
    for path in (SRT / "arg_groups" / "fields").glob("*.py"):
        fields |= declared(path)
    assert len(fields) > 400
    return fields | {"model_path": "m", "device": "cpu"}


def asked(defaults, **changed):
    return check_server_args(SimpleNamespace(**(defaults | changed)), CpuPlatform.rules, {})


def test_stock_defaults_on_cpu_are_refused_nothing(defaults):
    assert asked(defaults) == []
    assert asked(defaults, tp_size=4, attention_backend="torch_native", disable_radix_cache=True) == []


def test_every_rule_names_fields_that_sglang_has(defaults):
    named = {name for rule in FLAG_RULES for name in rule.fields.split()}
    assert named - set(defaults) == set()


def test_every_refused_environment_variable_request_field_and_key_exists():
    environ = (SRT / "environ.py").read_text()
    assert [name for name in ENVIRONMENT if f"    {name} = " not in environ] == []
    assert set(REQUEST_FIELDS) - set(declared(SRT / "managers" / "io_struct.py", "GenerateReqInput")) == set()
    assert set(SAMPLING_KEYS) - set(declared(SRT / "sampling" / "sampling_params.py", "SamplingParams")) == set()


@pytest.mark.parametrize(
    ("flag", "changed"),
    [
        ("--dp-size", {"dp_size": 2}),
        ("--enable-dp-attention", {"enable_dp_attention": True}),
        ("--pp-size", {"pp_size": 2}),
        ("--nnodes", {"nnodes": 2}),
        ("--enable-eplb", {"enable_eplb": True}),
        ("--ep-num-redundant-experts", {"ep_num_redundant_experts": 3}),
        ("--ep-dispatch-algorithm", {"ep_dispatch_algorithm": "dynamic"}),
        ("--elastic-ep-backend", {"elastic_ep_backend": "mooncake"}),
        ("--attn-cp-size", {"attn_cp_size": 2}),
        ("--enable-torch-symm-mem", {"enable_torch_symm_mem": True}),
        ("--dist-init-addr", {"dist_init_addr": "10.0.0.1:25000"}),
        ("--use-ray", {"use_ray": True}),
        ("--tokenizer-worker-num", {"tokenizer_worker_num": 2}),
        ("--detokenizer-worker-num", {"detokenizer_worker_num": 2}),
        ("--smg-grpc-mode", {"smg_grpc_mode": True}),
        ("--grpc-port", {"grpc_port": 9}),
        ("--skip-tokenizer-init", {"skip_tokenizer_init": True}),
        ("--is-embedding", {"is_embedding": True}),
        ("--disaggregation-mode", {"disaggregation_mode": "decode"}),
        ("--encoder-only", {"encoder_only": True}),
        ("--enable-multimodal", {"enable_multimodal": True}),
        ("--speculative-algorithm", {"speculative_algorithm": "NGRAM"}),
        ("--enable-lora-overlap-loading", {"enable_lora_overlap_loading": True}),
        ("--lora-backend", {"lora_backend": "triton", "lora_paths": ["a=b"]}),
        ("--quantization", {"quantization": "fp8"}),
        ("--load-format", {"load_format": "gguf"}),
        ("--model-loader-extra-config", {"model_loader_extra_config": '{"a": 1}'}),
        ("--custom-weight-loader", {"custom_weight_loader": ["a.b"]}),
        ("--weight-cache-mode", {"weight_cache_mode": "daemon"}),
        ("--delete-ckpt-after-loading", {"delete_ckpt_after_loading": True}),
        ("--enable-memory-saver", {"enable_memory_saver": True}),
        ("--cpu-offload-gb", {"cpu_offload_gb": 1}),
        ("--enable-hierarchical-cache", {"enable_hierarchical_cache": True}),
        ("--enable-lmcache", {"enable_lmcache": True}),
        ("--enable-session-radix-cache", {"enable_session_radix_cache": True}),
        ("--enable-torch-compile", {"enable_torch_compile": True}),
        ("--device", {"device": "cuda"}),
        ("--device", {"device": "xpu"}),
        ("--attention-backend", {"attention_backend": "intel_amx"}),
        ("--kv-cache-dtype", {"kv_cache_dtype": "fp4_e2m1"}),
        ("--kv-cache-dtype", {"kv_cache_dtype": "fp8_e4m3", "device": "cpu"}),
    ],
)
def test_an_unsupported_flag_is_refused_by_name_with_a_way_out(defaults, flag, changed):
    (refusal,) = asked(defaults, **changed)
    assert refusal.flag == flag
    assert refusal.value == changed[flag.lstrip("-").replace("-", "_")]
    assert refusal.why
    assert refusal.way_out


def test_a_switch_is_not_mistaken_for_the_size_one(defaults):
    sizes = {name for rule in FLAG_RULES if 1 in rule.allowed for name in rule.fields.split()}
    assert all(asked(defaults, **{name: True}) for name in sizes if name.startswith("enable_"))
    assert asked(defaults, dp_size=1, ep_size=1, page_size=1) == []


def test_all_refusals_are_told_at_once(defaults):
    found = asked(defaults, device="cuda", dp_size=2, use_ray=True)
    text = str(UnsupportedError(found))
    assert len(text.splitlines()) == 4
    assert "--dp-size 2:" in text
    assert "--use-ray:" in text
    assert "--device cuda: anchors hold no memory of such devices; use --device cpu" in text


@pytest.mark.parametrize("backend", ["flashinfer", "triton", "fa3"])
def test_cuda_may_be_tried_with_the_attention_backends_it_is_written_for(defaults, backend):
    view = defaults | {"device": "cuda", "attention_backend": backend}
    assert check_server_args(view, CudaPlatform.rules, {}) == []


def test_cuda_is_not_tried_with_what_it_is_not_written_for(defaults):
    view = defaults | {"device": "cuda", "attention_backend": "torch_native"}
    (refusal,) = check_server_args(view, CudaPlatform.rules, {})
    assert refusal.flag == "--attention-backend"


def test_kv_of_the_models_own_dtype_may_be_named(defaults):
    assert asked(defaults, dtype="bfloat16", kv_cache_dtype="bf16") == []
    assert asked(defaults, dtype="float32", kv_cache_dtype="bfloat16") == []


def test_a_mapping_is_checked_like_a_record(defaults):
    (refusal,) = check_server_args(defaults | {"pp_size": 3}, CpuPlatform.rules, {})
    assert str(refusal).startswith("--pp-size 3: ")


@pytest.mark.parametrize(("value", "refused"), [("1", True), ("true", True), ("0", False), ("", False)])
def test_the_rust_server_is_refused_when_its_variable_is_on(defaults, value, refused):
    found = check_server_args(defaults, CpuPlatform.rules, {"SGLANG_RUST_SERVER": value})
    assert [refusal.flag for refusal in found] == (["SGLANG_RUST_SERVER"] if refused else [])


def request(**fields):
    stock = declared(SRT / "managers" / "io_struct.py", "GenerateReqInput")
    return SimpleNamespace(**(stock | {"sampling_params": {"temperature": 0}} | fields))


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"sampling_params": None},
        {"sampling_params": [{"n": 4, "regex": "a+"}, {"json_schema": "{}", "beam_width": 1}]},
        {"image_data": [None, None], "lora_path": [None, "adapter"], "custom_logit_processor": [None, None]},
        {"return_hidden_states": [False, False], "bootstrap_room": [None], "return_logprob": [False]},
        {"stream": True, "priority": 3, "extra_key": "k", "cache_salt": "s", "session_id": "s"},
        {"return_sampling_mask": [False, True], "return_hidden_states": [False, "last"]},
        {"custom_logit_processor": [None, '{"callable": "80"}', ""]},
    ],
)
def test_plain_requests_and_batches_of_nothing_special_are_admitted(fields):
    assert check_generate_request(request(**fields)) is None


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("session_params", {"session_params": {"id": "s"}}),
        ("image_data", {"image_data": [[None], ["http://x/cat.png"]]}),
        ("image_data", {"image_data": object()}),
        ("audio_data", {"audio_data": "a.wav"}),
        ("input_embeds", {"input_embeds": [[0.0] * 8] * 4}),
        ("lora_id", {"lora_id": [None, "adapter"]}),
        ("return_routed_experts", {"return_routed_experts": True}),
        ("max_thinking_tokens", {"max_thinking_tokens": 5}),
        ("bootstrap_room", {"bootstrap_room": 0}),
        ("watermark", {"sampling_params": [{}, {"watermark": {"key": "k"}}]}),
        ("beam_width", {"sampling_params": {"beam_width": 2}}),
    ],
)
def test_what_cannot_be_resumed_is_refused_in_one_sentence_that_names_the_field(name, fields):
    told = check_generate_request(request(**fields))
    assert "cannot be resumed after a fault yet" in told
    assert told.endswith(f"send the request without {name}.")


@pytest.mark.parametrize("mode", [True, [False, True]])
def test_hidden_states_of_all_tokens_are_refused(mode):
    told = check_generate_request(request(return_hidden_states=mode))
    assert "return_hidden_states of all tokens cannot be resumed" in told


@pytest.mark.parametrize("text", ["{}", "no JSON", '{"callable": "no hex"}', "[]", '{"callable": 5}', 5])
def test_a_processor_that_ranks_could_not_read_is_refused(text):
    assert "custom_logit_processor must be" in check_generate_request(request(custom_logit_processor=["", text]))


def test_logprobs_are_admitted():
    assert check_generate_request(request(return_logprob=True)) is None


def routes_of_sglang():
    """The paths in the decorators of SGLang's HTTP server and of the routers that it includes."""
    paths = set()
    for name in ("http_server.py", "v1_loads.py", "elastic_ep.py"):
        for node in ast.walk(ast.parse((SRT / "entrypoints" / name).read_text())):
            for call in getattr(node, "decorator_list", ()):
                owner = getattr(getattr(call, "func", None), "value", None)
                if getattr(owner, "id", None) in ("app", "router") and call.func.attr != "exception_handler":
                    # os.environ.get("AIP_PREDICT_ROUTE", "/vertex_generate"): the default is the last constant
                    paths.update([n.value for n in ast.walk(call.args[0]) if isinstance(n, ast.Constant)][-1:])
    return paths


BUILT_IN = {"/openapi.json", "/docs", "/docs/oauth2-redirect", "/redoc", "/metrics"}  # FastAPI's and prometheus's


def test_every_route_of_sglang_is_either_served_or_refused():
    """A route that a new SGLang adds is in neither table, and somebody has to decide."""
    assert routes_of_sglang() == (set(ROUTES) | SERVED_ROUTES) - BUILT_IN
    assert set(ROUTES) & SERVED_ROUTES == set()


def test_every_message_that_may_reach_ranks_is_one_that_they_know():
    scheduler = (SRT / "managers" / "scheduler.py").read_text()
    assert [kind for kind in SERVED_MESSAGES if f"({kind}, " not in scheduler] == []
    assert [kind for kind in SERVED_MESSAGES if check_message(kind)] == []


@pytest.mark.parametrize("kind", ["SlowDownReqInput", "CheckWeightsReqInput", "RpcReqInput", "OfANewSGLangReqInput"])
def test_any_other_message_to_the_ranks_is_refused_by_name(kind):
    assert check_message(kind).startswith(f"{kind} is refused by anchortp-sglang")


def test_routes_that_a_recovery_could_not_honour_are_refused():
    assert "read-only" in check_route("/update_weights_from_disk")
    assert check_route("/open_session/") is not None
    assert check_route("/dumper/configure") is not None
    assert check_route("/v1/open_session", root_path="/v1") is not None
    assert [path for path in SERVED_ROUTES if check_route(path)] == []


def test_labels_that_metrics_do_not_have_are_refused():
    known = {"model_name": "m", "team": ""}
    assert check_custom_labels(None, known) is None
    assert check_custom_labels({"team": "a"}, known) is None
    assert "custom_labels has city" in check_custom_labels({"team": "a", "city": "b"}, known)
