"""Measures on a GPU, in one process of at most eight minutes, what cannot be measured without one.

    python benchmarks/gpu.py             writes results_gpu.json and results_gpu.md into this folder
    python benchmarks/gpu.py --tiny      sizes for a CPU: shows that all of it runs, and measures nothing of worth

Needs torch and transformers. The model has the shape of Qwen2.5-0.5B and random weights, so no completion ends before
its limit; rewards are made up, half of them right. What is not installed is skipped. A row that fails says why, and the
next one goes on.
"""

import argparse
import gc
import importlib
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import common
import harness.model
import verifier
from benchmarks.bench import head_naive, head_ours, head_trl, installed
from harness import cuda_graphs, tiny
from harness.run import Run

LIMIT = 7.5 * 60  # seconds; later rows are left out


@dataclass
class Size:
    layers: int = 24
    hidden: int = 896
    heads: int = 14
    kv_heads: int = 2
    intermediate: int = 4864
    vocabulary: int = 151_936
    n_prompts: int = 64  # of a training step
    group_size: int = 8
    tokens: int = 256  # of a completion
    rows: int = 256  # of the decoding rows
    scored: int = 16 * 1024  # tokens of the log-prob rows
    steps: int = 3
    copied: int = 2**30  # bytes


TINY = Size(2, 32, 2, 1, 32, 64, n_prompts=4, group_size=4, tokens=6, rows=8, scored=64, steps=1, copied=2**20)


class NotMeasured(Exception):
    """Why a row is left out."""


# --- the model, and time --------------------------------------------------------------------------------------------


def random_model(size: Size, device: torch.device, dtype: torch.dtype = torch.float32):
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        vocab_size=size.vocabulary, hidden_size=size.hidden, num_hidden_layers=size.layers,
        num_attention_heads=size.heads, num_key_value_heads=size.kv_heads, intermediate_size=size.intermediate,
        tie_word_embeddings=True, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    with device:
        return Qwen2ForCausalLM(config).to(dtype)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def seconds_of(work: Callable, device: torch.device) -> float:
    synchronize(device)
    start = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - start


def median_seconds(work: Callable, device: torch.device, runs: int = 3) -> float:
    work()  # warms up
    return statistics.median(seconds_of(work, device) for _ in range(runs))


# --- decoding ---------------------------------------------------------------------------------------------------------


def decode(sample: Callable, model, size: Size, tokens: int) -> None:
    """All rows from 64 tokens of prompt, with whichever sampler."""
    n_prompts = size.rows // size.group_size
    prompts = torch.randint(size.vocabulary, (n_prompts, 64), generator=torch.Generator().manual_seed(0)).tolist()
    sample(model, prompts, size.group_size, tokens, [-1], torch.rand(size.rows, tokens))


def generate(model, prompts, group_size, tokens, eos_ids, uniforms) -> None:
    """model.generate with the arguments of common.sample."""
    ids = torch.tensor(prompts, device=model.device)
    options = dict(do_sample=True, top_k=0, top_p=1.0, max_new_tokens=tokens, num_return_sequences=group_size)
    model.generate(ids, attention_mask=torch.ones_like(ids), pad_token_id=0, **options)


def bytes_per_second(size: Size, device: torch.device) -> float:
    """Of the device's memory, read and written by copying."""
    block = torch.empty(size.copied, dtype=torch.uint8, device=device)
    return 2 * size.copied / median_seconds(block.clone, device, runs=10)


def measure_decoding(size: Size, device: torch.device) -> list[dict]:
    """Tokens a second, eager, with CUDA graphs and by model.generate, against what the bandwidth allows: each token
    must read the weights in bf16 and, at half length, the cache of every row."""
    model = random_model(size, device).eval()
    low = random_model(size, device, torch.bfloat16).eval()  # what people give to model.generate
    n_weights = sum(p.numel() for p in model.parameters())
    head_size = size.hidden // size.heads
    cache = size.rows * (64 + size.tokens / 2) * size.layers * 2 * size.kv_heads * head_size * 2
    floor = (2 * n_weights + cache) / bytes_per_second(size, device)  # seconds a token
    what = f"decoding, {size.rows} rows, {size.tokens} tokens"
    rows = [row(f"{what}: bandwidth floor", 1000 * floor, "ms a token")]
    contenders = {
        "eager": (common.sample, model),
        "CUDA graphs": (cuda_graphs.sample, model),
        "generate, bf16 weights": (generate, low),
    }
    for name, (sample, contender) in contenders.items():
        decode(sample, contender, size, min(8, size.tokens))  # warms up
        seconds = seconds_of(lambda s=sample, m=contender: decode(s, m, size, size.tokens), device) / size.tokens
        rows.append(row(f"{what}: {name}", 1000 * seconds, "ms a token", f"{seconds / floor:.2f} times the floor"))
    return rows


def measure_profile(size: Size, device: torch.device) -> list[dict]:
    """What one decoded token costs: operations, and on a GPU kernels, launches and waits of the host."""
    model = random_model(size, device).eval()
    rows = []
    for name, sample in (("eager", common.sample), ("CUDA graphs", cuda_graphs.sample)):
        decode(sample, model, size, 3)  # warms up
        short, long = (count_events(lambda n=n, s=sample: decode(s, model, size, n)) for n in (4, 12))
        for what in long:
            rows.append(row(f"profile of a token, {name}: {what}", (long[what] - short[what]) / 8, "a token"))
    return rows


def count_events(work: Callable) -> dict[str, int]:
    from torch.autograd import DeviceType
    from torch.profiler import profile

    with profile() as profiler:
        work()
    counts = {"kernels": 0, "launches": 0, "waits": 0, "operations": 0}
    for event in profiler.events():
        counts["kernels"] += event.device_type == DeviceType.CUDA
        counts["launches"] += event.name.startswith(("cudaLaunchKernel", "cuLaunchKernel", "cudaGraphLaunch"))
        counts["waits"] += event.name in ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaMemcpy")
        counts["operations"] += event.name.startswith("aten::")
    return counts


# --- log-probs --------------------------------------------------------------------------------------------------------


def head_liger(hidden, weight, targets):
    from liger_kernel.ops.fused_linear_scaled_cross_entropy import LigerFusedLinearScaledCrossEntropyFunction as liger

    nll, entropy = liger.apply(hidden, weight, targets, return_entropy=True)
    return -nll, entropy


def what_liger_runs(device: torch.device) -> str:
    """The function that head_liger runs on this device: kernels on compute capability 9.0, elsewhere plain torch."""
    try:
        from liger_kernel.ops.fused_linear_scaled_cross_entropy import _resolve_implementation

        return _resolve_implementation(device).__name__
    except ImportError as error:  # the kernels need a package of their own
        raise NotMeasured(f"what Liger runs on this device cannot be loaded: {error}") from None


def measure_logprobs(name: str, size: Size, device: torch.device) -> list[dict]:
    """Time and peak memory of log-probs and entropy in bf16, forward and backward."""
    heads = {"ours": head_ours, "naive": head_naive, "TRL": head_trl, "Liger": head_liger}
    package = {"TRL": "trl", "Liger": "liger_kernel"}.get(name)
    if package and not installed(package):
        raise NotMeasured(f"{package} is not installed")
    label = f"Liger ({what_liger_runs(device)})" if name == "Liger" else name
    torch.manual_seed(0)
    hidden = torch.randn(size.scored, size.hidden).to(device, torch.bfloat16).requires_grad_()
    weight = (torch.randn(size.vocabulary, size.hidden) * 0.02).to(device, torch.bfloat16).requires_grad_()
    targets = torch.randint(size.vocabulary, (size.scored,)).to(device)
    gradient = torch.randn(size.scored).to(device)

    def work() -> tuple:
        hidden.grad = weight.grad = None
        logprobs, entropy = heads[name](hidden, weight, targets)
        ((gradient * logprobs.float()).sum() + 0.1 * entropy.float().sum()).backward()
        return logprobs, entropy

    sums = " and ".join(f"{float(x.detach().float().mean()):.4f}" for x in work())
    what = f"log-probs and entropy, {size.scored} x {size.vocabulary}: {label}"
    rows = [row(what, median_seconds(work, device), "s", f"same work: means {sums}")]
    if device.type == "cuda":
        hidden.grad = weight.grad = None
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        work()
        rows.append(row(what, (torch.cuda.max_memory_allocated() - before) / 2**30, "GiB"))
    return rows


# --- the scripts ------------------------------------------------------------------------------------------------------


def measure_script(size: Size, device: torch.device, name: str, *options: str) -> list[dict]:
    """Some steps of a script: seconds of the last one, and its peak memory."""
    if "--lora-rank" in options and not installed("peft"):
        raise NotMeasured("peft is not installed")

    def load_model(name, device, *options):
        dtype = next((option for option in options if isinstance(option, torch.dtype)), torch.float32)
        return random_model(size, device, dtype), tiny.new_tokenizer()

    grades = iter([(1.0, "correct"), (0.0, "wrong")] * 10**6)
    replaced = [
        (harness.model, "load_model", load_model),
        (verifier, "grade", lambda *_: next(grades)),
        (Run, "save", lambda run: None),  # gigabytes of random weights
        (Run, "write_model", lambda run, *_: None),
    ]
    before = [(owner, attribute, getattr(owner, attribute)) for owner, attribute, _ in replaced]
    with tempfile.TemporaryDirectory() as folder:
        settings = {
            "model": "random", "out": folder, "name": "run", "eval-rows": 0, "steps": size.steps,
            "n-prompts": size.n_prompts, "group-size": size.group_size, "max-new-tokens": size.tokens,
        }  # fmt: skip
        arguments = [f"--{key}={value}" for key, value in settings.items()]
        sys.argv = [f"{name}.py", *arguments, *options]
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        for owner, attribute, value in replaced:
            setattr(owner, attribute, value)
        try:
            importlib.import_module(name).main()
        finally:
            for owner, attribute, value in before:
                setattr(owner, attribute, value)
        timing = json.loads((Path(folder) / "run" / "timing.jsonl").read_text().splitlines()[-1])
        metrics = json.loads((Path(folder) / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    what = " ".join([f"{name}.py", *options])
    gap = f"sampling_logp_difference {metrics['sampling_logp_difference']:.2g}"
    rows = [
        row(f"{what}: sampling", timing["sample"], "s a step", f"{timing['tokens'] / timing['sample']:.0f} tokens/s"),
        row(f"{what}: update", timing["update"], "s a step", gap),
    ]
    if "peak_gib" in timing:
        rows.append(row(f"{what}: peak memory", timing["peak_gib"], "GiB"))
    return rows


# --- all rows ---------------------------------------------------------------------------------------------------------


def row(what: str, value: float, unit: str, note: str = "") -> dict:
    return {"row": what, "value": value, "unit": unit, "note": note}


def measure_all(size: Size, device: torch.device) -> list[dict]:
    """Every row. One that could not be measured has no value, and its reason as a note."""
    measurements: dict[str, tuple] = {"decoding": (measure_decoding, size, device)}
    for name in ("ours", "naive", "TRL", "Liger"):
        measurements[f"log-probs: {name}"] = (measure_logprobs, name, size, device)
    measurements["profile of a token"] = (measure_profile, size, device)
    scripts = [(name,) for name in ("grpo", "dapo", "egsw", "gtpo", "grpo_s")]
    for script in [*scripts, ("egsw", "--cuda-graphs"), ("egsw", "--lora-rank", "32")]:
        measurements[" ".join(script)] = (measure_script, size, device, *script)
    start = time.perf_counter()
    rows = []
    for name, (measure, *arguments) in measurements.items():
        try:
            if time.perf_counter() - start > LIMIT:
                raise NotMeasured("no time was left")
            new_rows = measure(*arguments)
        except NotMeasured as reason:
            new_rows = [row(name, None, "", f"not measured: {reason}")]
        except (Exception, SystemExit) as error:
            new_rows = [row(name, None, "", f"failed: {type(error).__name__}: {error}")]
        for new_row in new_rows:
            print(markdown(new_row), flush=True)
        rows += new_rows
        gc.collect()  # or models of this row would count in the memory of the next one
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return rows


def markdown(row: dict) -> str:
    value = "" if row["value"] is None else f"{row['value']:.4g} {row['unit']}"
    return f"| {row['row']} | {value} | {' '.join(row['note'].split())} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="sizes for a CPU")
    parser.add_argument("--out", default=str(Path(__file__).parent), help="folder for results_gpu.json and .md")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not args.tiny:
        parser.error("there is no GPU; --tiny runs everything at a small size")
    packages = {name: installed(name) for name in ("torch", "transformers", "trl", "liger_kernel", "peft")}
    machine = {"device": torch.cuda.get_device_name() if device.type == "cuda" else "CPU", **packages}
    print(machine)
    rows = measure_all(TINY if args.tiny else Size(), device)
    out = Path(args.out)
    (out / "results_gpu.json").write_text(json.dumps({"machine": machine, "rows": rows}, indent=2) + "\n")
    table = ["| what | measured | note |", "|---|---|---|", *map(markdown, rows)]
    (out / "results_gpu.md").write_text("\n".join(table) + "\n")


if __name__ == "__main__":
    main()
