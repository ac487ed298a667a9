"""What engine tests do inside forked processes. Returns go back as JSON."""

import contextlib
import json
import multiprocessing
import os
import select
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path

ENGINE_FLAGS = {"dtype": "float32", "max_total_tokens": 4096, "random_seed": 1}


def stock_generate(model, prompts, max_new_tokens, latents=False, adapters=None, lora_paths=None):
    """Stock SGLang's Engine at TP=1, with none of our hooks. Its processes are forked, not spawned: they
    run the same code, without importing it again. ``latents``: tell it how to attend over them on a CPU.
    ``lora_paths``: let it serve adapters there; ``adapters``: the one of each prompt."""
    from sglang.srt.entrypoints.engine import Engine

    from anchortp_sglang.platforms.cpu import latent_attention, sgl_kernel_stub, unpinned
    from anchortp_sglang.platforms.cpu.environment import cpu_defaults

    if latents:
        latent_attention.register()
    if lora_paths:
        unpinned.register()
    sgl_kernel_stub.install_operators()
    multiprocessing.set_start_method("fork", force=True)
    multiprocessing.set_start_method = lambda *args, **kwargs: None
    flags = cpu_defaults({}, os.environ, 1, [0]).flags | ENGINE_FLAGS
    engine = Engine(model_path=model, tp_size=1, log_level="error", lora_paths=lora_paths, **flags)
    answers = _generate(engine, prompts, max_new_tokens, adapters)
    with contextlib.suppress(AttributeError):  # for Mistral-3, of a cache that its processor does not have
        engine.shutdown()
    return answers


def transformers_generate(model, prompts, max_new_tokens):
    """Hugging Face's own code, for models that stock SGLang does not serve on a CPU."""
    import torch
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(model, dtype="float32")
    answers = []
    for ids in prompts:
        with torch.no_grad():
            whole = loaded.generate(
                torch.tensor([ids]), max_new_tokens=max_new_tokens, do_sample=False, eos_token_id=[]
            )
            logprobs = loaded(whole).logits[0, :-1].log_softmax(-1)
        given = logprobs.gather(1, whole[0, 1:, None])[:, 0].tolist()
        prompt, new = given[: len(ids) - 1], given[len(ids) - 1 :]
        answers.append({"ids": whole[0, len(ids) :].tolist(), "prompt_logprobs": prompt, "logprobs": new})
    return answers


def anchored_generate(model, prompts, max_new_tokens, adapters=None, **arguments):
    """Ours."""
    from anchortp_sglang import Engine

    engine = Engine(model_path=model, **(ENGINE_FLAGS | arguments))
    answers = _generate(engine, prompts, max_new_tokens, adapters)
    engine.shutdown()
    return answers


def _generate(engine, prompts, max_new_tokens, adapters=None):
    """Greedy, all prompts in one batch; per prompt its tokens and the logprobs of prompt and answer."""
    sampling = {"temperature": 0, "max_new_tokens": max_new_tokens, "ignore_eos": True}
    logprobs = {"return_logprob": True, "logprob_start_len": 0}
    answers = engine.generate(input_ids=prompts, sampling_params=sampling, lora_path=adapters, **logprobs)
    return [
        {
            "ids": answer["output_ids"],
            "prompt_logprobs": [entry[0] for entry in answer["meta_info"]["input_token_logprobs"][1:]],
            "logprobs": [entry[0] for entry in answer["meta_info"]["output_token_logprobs"]],
        }
        for answer in answers
    ]


def launch(argv):
    """The launcher as from a command line. Ends with SystemExit, or runs until it is stopped."""
    from anchortp_sglang.launch_server import main

    _forget_preloading()
    main(argv)


def launch_with_a_wrong_rule(argv, family, rule, change):
    """The same, after a mistake in a family's table, see ``_make_a_mistake``."""
    _make_a_mistake(family, rule, change)
    launch(argv)


def anchored_generate_with_a_wrong_rule(family, rule, change, **arguments):
    """Ours, after a mistake in a family's table."""
    _make_a_mistake(family, rule, change)
    return anchored_generate(**arguments)


def _make_a_mistake(family, rule, change):
    """``change`` is made to the family's rule named ``rule``, or None to leave the rule out."""
    from anchortp_sglang.planning.model import axes

    table = axes.FAMILIES[family]
    part = next(part for part in ("layer", "dense", "sparse") if any(one.name == rule for one in getattr(table, part)))
    rules = getattr(table, part)
    changed = [one if one.name != rule else change and replace(one, **_tuples(change)) for one in rules]
    axes.FAMILIES[family] = replace(table, **{part: tuple(filter(None, changed))})


def launch_with_a_hook(argv, target):
    """The same, with one hook more."""
    from anchortp_sglang.hooks import table

    table.HOOKS += (table.Hook(target, "before", launch, "only a test"),)
    launch(argv)


def launch_with_a_rival(argv, target):
    """The same, after another plugin has asked to replace what we hook."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    HookRegistry.register(target, lambda *args, **kwargs: None, HookType.REPLACE)
    HookRegistry.apply_hooks()
    launch(argv)


def launch_with_a_manifest(argv, path):
    """The same, with another manifest."""
    from anchortp_sglang.hooks import manifest

    manifest.manifest_path = lambda: Path(path)
    launch(argv)


def hooks_of_a_preloaded_process():
    """Whose hooks SGLang's registry has; what is patched once ours are installed; what we mean to patch."""
    from sglang.srt.plugins import load_plugins
    from sglang.srt.plugins.hook_registry import HookRegistry

    from anchortp_sglang.hooks import install, table

    load_plugins()
    before = sorted({source.plugin_name for hooks in HookRegistry._hooks.values() for _, _, source in hooks if source})
    originals = install._originals(table.HOOKS)
    table.install_all()
    install.verify(table.HOOKS, originals)
    return before, sorted(HookRegistry._patched), sorted({hook.target for hook in table.HOOKS})


def manifest_text(path):
    from anchortp_sglang.hooks import manifest, table

    manifest.write_manifest(table.HOOKS, Path(path))
    return manifest.manifest_path().read_text(encoding="utf-8"), Path(path).read_text(encoding="utf-8")


def engine_refusals(model, cases):
    """The text of the ValueError that each set of keyword arguments raises."""
    from anchortp_sglang import Engine

    texts = []
    for arguments in cases:
        try:
            Engine(model_path=model, **arguments).shutdown()
            texts.append(None)
        except ValueError as error:
            texts.append(str(error))
    return texts


def generate_through_a_kill(model, prompt, max_new_tokens, victim, **arguments):
    """A stream whose rank ``victim`` is killed after ten tokens, and the same request before that."""
    from anchortp_sglang import Engine
    from anchortp_sglang.http.status import status

    engine = Engine(model_path=model, **ENGINE_FLAGS, **arguments)
    sampling = {"temperature": 0, "max_new_tokens": max_new_tokens, "ignore_eos": True}
    unbroken = engine.generate(input_ids=prompt, sampling_params=sampling)["output_ids"]
    coordinator = engine._anchor_runtime.coordinator
    killed, ids = None, []
    for chunk in engine.generate(input_ids=prompt, sampling_params=sampling, stream=True):
        ids = chunk["output_ids"]
        if killed is None and len(ids) >= 10:
            killed = coordinator.generation.ranks[victim].pid
            os.kill(killed, signal.SIGKILL)
    refused = refused_calls(engine)
    found = status(coordinator)
    engine.shutdown()
    engine.shutdown()
    return {"unbroken": unbroken, "ids": ids, "status": found, "killed": killed, "refused": refused}


def refused_calls(engine):
    """The text of the ValueError of each call that would reach ranks, or what it returned. Twice: the first leaves
    nothing that the second waits for."""
    calls = {
        "CheckWeights": lambda: engine.loop.run_until_complete(
            engine.tokenizer_manager.check_weights(_check_weights())
        ),
        "GetWeightsByName": lambda: engine.get_weights_by_name("model.norm.weight"),
        "Profile": engine.start_profile,
        "ExpertDistribution": engine.start_expert_distribution_record,
        "UpdateWeightFromDisk": lambda: engine.update_weights_from_disk("nowhere"),
        "Rpc": lambda: engine.save_remote_model(url="nowhere"),
        "OpenSession": lambda: engine.open_session(capacity_of_str_len=9),
        "top_k": lambda: engine.generate("a", {"top_k": 2**31}),
    }
    return {name: [_told(call), _told(call)] for name, call in calls.items()}


def _check_weights():
    from sglang.srt.managers.io_struct import CheckWeightsReqInput

    return CheckWeightsReqInput(action="reset_tensors")


def _told(call):
    try:
        return repr(call())
    except ValueError as error:
        return f"refused: {error}"


def generate_with_threads(model, prompt, max_new_tokens):
    """An Engine in a process that has threads already, hence cannot be forked."""
    resting = threading.Event()
    threading.Thread(target=resting.wait, daemon=True).start()
    return generate_through_a_kill(model, prompt, max_new_tokens, 0, tp_size=2)


def _forget_preloading():
    """The preloaded process bound threads for eight ranks; a launcher binds for its own."""
    del os.environ["SGLANG_CPU_OMP_THREADS_BIND"]


def _tuples(value):
    """What JSON made lists."""
    if isinstance(value, dict):
        return {key: _tuples(item) for key, item in value.items()}
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def audited_generate(model, path, waves, max_new_tokens, **arguments):
    """How many tokens of these waves of prompts, each one batch, were cached. Before each prefill's result the page
    table is audited, in a line of ``path``: slots that are free, that are free but have an entry, that verify."""
    from anchortp_sglang import Engine
    from anchortp_sglang.hooks import table
    from anchortp_sglang.rank.attachment import current

    def audit(processor, batch, *args, **kwargs):
        attachment = current()
        assert attachment is not None
        table = attachment.prefixes.table
        if table is not None:
            free = processor.token_to_kv_pool_allocator.get_all_free_pages().numpy()
            with Path(path).open("a") as lines:
                stale = int((table._hash[free] != 0).sum())
                lines.write(json.dumps({"free": len(free), "stale": stale, "kept": len(table.retained_slots())}) + "\n")

    target = (
        "sglang.srt.managers.scheduler_components.batch_result_processor.SchedulerBatchResultProcessor."
        "process_batch_result_prefill"
    )
    table.HOOKS += (table.Hook(target, "before", audit, "only a test"),)
    engine = Engine(model_path=model, anchor_allow_drift=True, **ENGINE_FLAGS | arguments)
    sampling = {"temperature": 0, "max_new_tokens": max_new_tokens, "ignore_eos": True}
    cached = 0
    for wave in waves:
        answers = engine.generate(input_ids=wave, sampling_params=sampling)
        cached += sum(answer["meta_info"]["cached_tokens"] for answer in answers)
    engine.shutdown()
    return cached


def load_beside_stock(argv):
    """The launcher for a model that SGLang builds but cannot serve here. On its one rank stock's own loader fills a
    second model, and the start ends with how many parameters of ours are equal, or which are not."""
    from sglang.srt.model_loader.weight_utils import safetensors_weights_iterator

    from anchortp_sglang.admission import checks
    from anchortp_sglang.rank.weights import loader
    from anchortp_sglang.startup import preflight, start

    for module in (preflight, start):
        module.refuse_layout_only = lambda model: None
    checks._check_device = lambda *arguments: []
    bind, build = loader.bind, loader._initialize_model
    stock = []

    def build_two(*arguments):
        stock.append(build(*arguments))
        return build(*arguments)

    def compare(model, attachment):
        bind(model, attachment)
        attachment.filler.wait()
        files = sorted(attachment.assignment.checkpoint.glob("*.safetensors"))
        stock[0].load_weights(safetensors_weights_iterator([str(file) for file in files]))
        ours, theirs = (dict(one.named_parameters()) for one in (model, stock[0]))
        differ = [name for name in theirs if not _same_bytes(ours[name], theirs[name])]
        raise RuntimeError(f"{len(theirs) - len(differ)} parameters are equal, {len(differ)} differ: {differ[:4]}")

    loader.bind, loader._initialize_model = compare, build_two
    launch(argv)


def _same_bytes(one, other):
    import torch

    one, other = (tensor.detach().contiguous().reshape(-1).view(torch.uint8) for tensor in (one, other))
    return torch.equal(one, other)


def generate_until_down(model, prompt, max_new_tokens):
    """An Engine that loses a rank, goes on, and then loses a device that it cannot do without: what a call gives after
    each, and how long it takes."""
    from anchortp_sglang import Engine

    engine = Engine(model_path=model, tp_size=2, anchor_min_devices=2, **ENGINE_FLAGS)
    coordinator = engine._anchor_runtime.coordinator
    sampling = {"temperature": 0, "max_new_tokens": max_new_tokens, "ignore_eos": True}
    calls = {"generate": lambda: engine.generate(input_ids=prompt, sampling_params=sampling)["output_ids"]}
    unbroken = calls["generate"]()
    info = {"get_server_info": lambda: engine.get_server_info()["max_total_num_tokens"], "flush": engine.flush_cache}
    kill_and_wait(coordinator.generation.ranks[1].pid)
    given = [("recovering", *_timed(call)) for call in calls.values()]
    kill_and_wait(coordinator.processes.anchors.processes[1].pid)
    kill_and_wait(coordinator.generation.ranks[1].pid)
    given.append(("going down", *_timed(calls["generate"])))
    for _ in range(2):
        given += [("down", *_timed(call)) for call in (calls | info).values()]
    engine.tokenizer_manager.abort_request(abort_all=True)
    engine.shutdown()
    return {"unbroken": unbroken, "given": given}


def kill_and_wait(pid):
    pidfd = os.pidfd_open(pid)
    os.kill(pid, signal.SIGKILL)
    select.select([pidfd], [], [], 10)
    os.close(pidfd)


def _timed(call):
    """(what it returns, or the error's text, whether it raised, seconds)"""
    from fastapi import HTTPException

    began = time.monotonic()
    try:
        given, raised = call(), False
    except HTTPException as error:
        given, raised = str(error), True
    return given, raised, time.monotonic() - began
