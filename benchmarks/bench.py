"""Measures sampling, an RL step and log-probs against what people would use instead.

    python benchmarks/bench.py                        every row that this machine can measure; writes results.json
    python benchmarks/bench.py --rows rollout step    some of them
    python benchmarks/bench.py --base runs/egsw-1/model   another checkpoint for `rollout` and `step`
    python benchmarks/bench.py --model FOLDER --dataset FILE   a real model alone, on JSON lines

The contenders take turns in one process; for memory, each measurement is a process. First they show that they do the
same work. Each row has medians, and the ratio to the other contender, run by run, with its minimum and maximum.
Absolute times depend on the machine and the hour. What needs a GPU is in benchmarks/gpu.py.
"""

import argparse
import contextlib
import functools
import io
import json
import platform
import random
import statistics
import subprocess
import sys
import threading
import time
import zlib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import common
import grpo
import verifier
from harness import data, decoder, rewards
from harness.options import RunConfig
from harness.trainer import Trainer
from tasks import arithmetic

Q, G, T = 32, 8, 64
V, D, N = 151_936, 896, 2_048  # Qwen2.5-0.5B's vocabulary and hidden size


def alternate(contenders: dict, runs: int) -> dict[str, list[float]]:
    """Calls each contender once to warm up, and then all in turn, `runs` times. Each returns its own number."""
    for contender in contenders.values():
        contender()
    results = {name: [] for name in contenders}
    for _ in range(runs):
        for name, contender in contenders.items():
            results[name].append(contender())
    return results


def row(title: str, unit: str, ours: list[float], other_name: str, other: list[float], more_is_better: bool) -> dict:
    """One line of the table: medians, and the ratio of each pair, above 1 if ours is better."""
    ratios = [a / b if more_is_better else b / a for a, b in zip(ours, other, strict=True)]
    medians = statistics.median(ours), statistics.median(other)
    spread = statistics.median(ratios), min(ratios), max(ratios)
    print(f"{title:44} {medians[0]:>10.4g} {unit:9} {other_name}: {medians[1]:>10.4g}   x{spread[0]:.2f} "
          f"({spread[1]:.2f} to {spread[2]:.2f})", flush=True)  # fmt: skip
    keys = ("row", "unit", "ours", "against", "other", "ratio", "ratio_min", "ratio_max")
    return dict(zip(keys, (title, unit, medians[0], other_name, medians[1], *spread), strict=True))


def load(base: str):
    """Model and tokenizer of a checkpoint."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), AutoTokenizer.from_pretrained(base)


def reward_of(text: str, problem: dict) -> float:
    return verifier.math_reward(text, problem["answer"])


def any_reward(completion: str, row: dict) -> float:
    """0 or 1, whatever is right: nearly every group has both. It is given as --reward."""
    return float(zlib.crc32(completion.encode()) % 2)


def bench_rollout(base: str, runs: int) -> list[dict]:
    """Completion tokens a second against model.generate: same prompts, group size, temperature and stop rule."""
    _, tokenizer = load(base)
    problems = arithmetic.problems(Q, 0, held_out=True)
    prompts = tokenizer([p["question"] for p in problems])["input_ids"]
    return sampling_rows("rollout, tiny, 32 x 8", base, problems, prompts, G, T, True, ["dynamic"], runs)


def bench_model(folder: str, dataset: str, runs: int, asked: list[str]) -> list[dict]:
    """Sampling and a step with a real model, on 8 x 8 rows of at most 96 tokens. Sampling with its stop token, and
    without; the step with the verifier's rewards, and with rewards that differ in every group."""
    _, tokenizer = load(folder)
    rows = [json.loads(line) for line in Path(dataset).read_text().splitlines()]
    problems = []
    for row in rows:
        text = data.prompt_text(tokenizer, [{"role": "user", "content": row["question"]}], "", "")
        ids = data.prompt_ids(tokenizer, text)
        answer = verifier.gold_answer(row["answer"])
        problems.append({"question": text, "answer": answer, "prompt_ids": ids, "row": row})
    first = problems[:8]
    prompts = [problem["prompt_ids"] for problem in first]
    print(f"  prompts of {statistics.mean(map(len, prompts)):.0f} tokens, at most {max(map(len, prompts))}")
    name = Path(folder).name
    results = []
    if "rollout" in asked:
        for stops in (True, False):
            title = f"{name}, 8 x 8, {'up to' if stops else 'all'} 96 tokens"
            results += sampling_rows(title, folder, first, prompts, 8, 96, stops, ["dynamic", "static"], runs)
    if "step" in asked:
        for reward in (None, f"{__file__}:any_reward"):
            title = f"GRPO step, {name}, 8 x 8, {'any reward' if reward else 'the verifier'}"
            results += step_rows(title, folder, problems, (8, 8, 96), reward, micro_batches=[16], steps=2, runs=runs)
    return results


def sampling_rows(title, base, problems, prompts, group_size, max_tokens, stops, caches, runs) -> list[dict]:
    """A row of common.sample against generate with each kind of cache. stops: whether EOS ends a completion."""
    from transformers import GenerationConfig

    model, tokenizer = load(base)
    eos = tokenizer.eos_token_id
    model.generation_config.eos_token_id = None  # generate would use it wherever the argument is None
    batch = tokenizer.pad({"input_ids": prompts}, padding_side="left", return_tensors="pt")
    seen: dict[str, list[tuple]] = {}

    def note(name: str, ids: list[list[int]], start: float) -> float:
        seconds = time.perf_counter() - start
        texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
        rewards = [reward_of(text, problems[i // group_size]) for i, text in enumerate(texts)]
        lengths = [len(x) for x in ids]
        seen.setdefault(name, []).append((statistics.mean(lengths), max(lengths), statistics.mean(rewards)))
        return sum(lengths) / seconds

    def ours() -> float:
        uniforms = torch.rand(len(prompts) * group_size, max_tokens)
        start = time.perf_counter()
        r = common.sample(model, prompts, group_size, max_tokens, [eos] if stops else [], uniforms)
        lengths = r.completion_lengths().int().tolist()
        return note("ours", [ids[:n] for ids, n in zip(r.completion_ids.tolist(), lengths, strict=True)], start)

    def generate(cache: str) -> float:
        config = GenerationConfig(
            do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=max_tokens,
            pad_token_id=tokenizer.pad_token_id, eos_token_id=eos if stops else None, cache_implementation=cache,
            num_return_sequences=group_size, disable_compile=True,
        )  # fmt: skip
        start = time.perf_counter()
        rows = model.generate(**batch, generation_config=config)[:, batch["input_ids"].shape[1] :].tolist()
        ids = [row[: row.index(eos) + 1] if stops and eos in row else row for row in rows]
        return note(f"generate, {cache}", ids, start)

    contenders = {"ours": ours} | {f"generate, {cache}": functools.partial(generate, cache) for cache in caches}
    results = alternate(contenders, runs)
    for name, values in seen.items():
        length, longest, reward = (statistics.mean(x) for x in zip(*values, strict=True))
        print(f"  same work: {name}: mean length {length:.2f} (longest {longest:.1f}), mean reward {reward:.3f}")
        ours_length, _, ours_reward = (statistics.mean(x) for x in zip(*seen["ours"], strict=True))
        assert abs(length - ours_length) < 0.15 * length and abs(reward - ours_reward) < 0.08
    others = [name for name in contenders if name != "ours"]
    return [row(title, "tokens/s", results["ours"], other, results[other], True) for other in others]


def bench_step(base: str, runs: int) -> list[dict]:
    """A GRPO step of the tiny base."""
    _, tokenizer = load(base)
    problems = arithmetic.problems(1024, 0, held_out=False)
    encoded = [{**problem, "prompt_ids": tokenizer(problem["question"])["input_ids"]} for problem in problems]
    title = "GRPO step, tiny, 32 x 8"
    return step_rows(title, base, encoded, (Q, G, T), None, micro_batches=[64, 128, 256], steps=6, runs=runs)


def step_rows(
    title: str, base: str, problems: list[dict], size: tuple[int, int, int], reward: str | None,
    micro_batches: list[int], steps: int, runs: int,
) -> list[dict]:  # fmt: skip
    """Seconds of a whole GRPO step (rollout, verify, score, update) against TRL's trainer at its best batch size.

    size: prompts, completions of each, and most tokens. reward: as --reward. steps: of each measurement; the first does
    not count.
    """
    import datasets
    from transformers import TrainerCallback
    from transformers.utils import logging
    from trl import GRPOConfig, GRPOTrainer

    logging.set_verbosity_error()
    n_prompts, group_size, max_new_tokens = size
    by_question = {problem["question"]: problem for problem in problems}
    grade = rewards.load(reward)

    def ours(seconds: list[float], steps: int) -> float:
        model, tokenizer = load(base)
        cfg = RunConfig(
            n_prompts=n_prompts, group_size=group_size, max_new_tokens=max_new_tokens, reward=reward, lr=1e-6,
            token_budget=2048,
        )  # fmt: skip
        trainer = Trainer(cfg, model, tokenizer, problems, base)
        mean_rewards = []
        for _ in range(steps):
            start = time.perf_counter()
            rollout = trainer.verify(trainer.sample())
            A = grpo.advantages(rollout.rewards, rollout.group)
            for minibatch in trainer.minibatches(rollout, "sequence", A):
                for batch in minibatch:
                    ratio = (batch.logprobs - batch.old_logprobs).exp()
                    per_token = grpo.loss(ratio, A[batch.rows], batch.mask)
                    (per_token * batch.loss_weights).sum().backward()
                    trainer.record(batch, per_token, **common.clip_fractions(ratio, A[batch.rows], 0.2, 0.2))
                trainer.optimizer_step()
            seconds.append(time.perf_counter() - start)
            mean_rewards.append(float(rollout.rewards.mean()))
        return statistics.mean(mean_rewards)

    def trl(seconds: list[float], steps: int, micro: int) -> float:
        model, tokenizer = load(base)
        mean_rewards = []

        def reward_function(prompts, completions, **_):
            scores = []
            for prompt, completion in zip(prompts, completions, strict=True):
                score, _ = grade({**by_question[prompt], "completion": completion})
                scores.append(score)
            mean_rewards.append(statistics.mean(scores))
            return scores

        class Clock(TrainerCallback):
            def on_step_begin(self, *args, **keywords):
                self.start = time.perf_counter()

            def on_step_end(self, *args, **keywords):
                seconds.append(time.perf_counter() - self.start)

        options = GRPOConfig(
            output_dir="/tmp/bench-trl", per_device_train_batch_size=micro,
            gradient_accumulation_steps=n_prompts * group_size // micro, num_generations=group_size,
            max_completion_length=max_new_tokens, max_steps=steps, learning_rate=1e-6, beta=0.0, temperature=1.0,
            top_k=0, gradient_checkpointing=False, bf16=False, use_cpu=not torch.cuda.is_available(), report_to="none",
            save_strategy="no", logging_strategy="no", disable_tqdm=True, loss_type="grpo", num_iterations=1,
        )  # fmt: skip
        questions = datasets.Dataset.from_list([{"prompt": p["question"]} for p in problems])
        with contextlib.redirect_stdout(io.StringIO()):
            GRPOTrainer(
                model, reward_function, options, questions, processing_class=tokenizer, callbacks=[Clock()]
            ).train()
        return statistics.mean(mean_rewards)

    results: dict[str, list[float]] = {"ours": [], **{f"TRL {micro}": [] for micro in micro_batches}}
    for i in range(runs):
        for name in results:
            seconds: list[float] = []
            mean_reward = ours(seconds, steps) if name == "ours" else trl(seconds, steps, int(name.split()[1]))
            results[name].append(statistics.median(seconds[1:]))
            if i == 0:  # that all do the same work
                print(f"  same work: {name}, mean reward {mean_reward:.3f}", flush=True)
    best = min((name for name in results if name != "ours"), key=lambda name: statistics.median(results[name]))
    return [row(title, "s", results["ours"], best, results[best], False)]


def graded_texts() -> dict[str, list[tuple[str, str]]]:
    """Completions and their golds: word problems, the labelled mathematics of the tests, and random tokens."""
    rng = random.Random(0)
    numbers = [(rng.randint(2, 999), rng.randint(2, 999)) for _ in range(1000)]
    words = [(f"She sold {a} in May, {a} + {b} = {a + b} altogether.\n#### {a + b}", str(a + b)) for a, b in numbers]
    cases = [json.loads(line) for line in (ROOT / "tests" / "verifier_cases.jsonl").read_text().splitlines()]
    mathematics = [(c["completion"], c["answer"]) for c in cases if "\\" in c["answer"] and len(c["completion"]) < 300]
    signs = r"\frac{ } { } \sqrt{ ( ) ^ ^{ ! + - * / 1 2 99 10^ x y i e \pi \sin \ln | , = < \le [ ] \cup or km %"
    garbage = [
        (rf"\boxed{{{' '.join(rng.choices(signs.split(), k=rng.randint(3, 60)))}}}", "x^2+1") for _ in range(300)
    ]
    return {"word problems": words, "mathematics": mathematics, "garbage": garbage}


def bench_verifier(base: str, runs: int) -> list[dict]:
    """Graded completions a second against math-verify alone, which is slow where it cannot parse."""
    import logging

    from math_verify import parse, verify

    logging.disable(logging.WARNING)  # math-verify reports each text that it cannot parse

    def ours(texts: list[tuple[str, str]]) -> float:
        for remembers in (verifier._tidy, verifier._tokens, verifier._read, verifier._compute):
            remembers.cache_clear()
        start = time.perf_counter()
        for completion, gold in texts:
            verifier.grade(completion, gold)
        return len(texts) / (time.perf_counter() - start)

    def theirs(texts: list[tuple[str, str]]) -> float:
        start = time.perf_counter()
        for completion, gold in texts:
            verify(parse(f"\\boxed{{{gold}}}"), parse(completion))
        return len(texts) / (time.perf_counter() - start)

    rows = []
    for kind, texts in graded_texts().items():
        results = alternate({"ours": lambda t=texts: ours(t), "math-verify": lambda t=texts: theirs(t)}, runs)
        rows.append(row(f"verifier, {kind}", "texts/s", results["ours"], "math-verify", results["math-verify"], True))
    return rows


# --- log-probs: each measurement is a process, for its peak memory ---------------------------------------------------


def head_inputs(n: int):
    torch.manual_seed(0)
    hidden, weight = torch.randn(n, D), torch.randn(V, D) * 0.02
    return hidden.requires_grad_(), weight.requires_grad_(), torch.randint(0, V, (n,)), torch.randn(n)


def head_naive(hidden, weight, targets):
    logp = (hidden @ weight.T).log_softmax(-1)
    return logp.gather(1, targets[:, None]).squeeze(1), -(logp.exp() * logp).sum(-1)


def head_ours(hidden, weight, targets):
    return decoder.HeadLogprobs.apply(hidden, weight, None, targets, 1.0, None, 1.0, True)


def head_trl(hidden, weight, targets):
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE as size
    from trl.trainer.utils import _ChunkedLogProbFunction as function

    return function.apply(hidden, weight, None, targets, 1.0, size, None, 1.0, ("log_probs", "entropy"))[:2]


def memory() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def watched(work) -> tuple[float, float]:
    """Seconds, and the peak memory of the process above its start, in MiB."""
    start_memory, peak, done = memory(), [0], threading.Event()

    def watch():
        while not done.is_set():
            peak[0] = max(peak[0], memory())
            time.sleep(0.002)

    thread = threading.Thread(target=watch)
    thread.start()
    start = time.perf_counter()
    work()
    seconds = time.perf_counter() - start
    done.set()
    thread.join()
    return seconds, (peak[0] - start_memory) / 2**20


def measure_head(name: str) -> dict:
    """Log-probs and entropy, forward and backward; 519 MiB of it are the weight's gradient. Needs its own process."""
    hidden, weight, targets, g = head_inputs(N)
    out: list = []

    def work():
        logp, entropy = globals()[f"head_{name}"](hidden, weight, targets)
        ((g * logp).sum() + 0.1 * entropy.sum()).backward()
        out.extend([float(logp.detach().sum()), float(entropy.detach().sum())])

    seconds, mib = watched(work)
    check = [*out, float(hidden.grad.abs().sum()), float(weight.grad.abs().sum())]
    return {"seconds": seconds, "mib": mib, "check": check}


def measure_growth(length: str) -> dict:
    """The log-probs of 8 completions in micro-batches of 2,048 tokens, with backward. Needs its own process."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    n = int(length)
    config = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16)
    model = Qwen3ForCausalLM(Qwen3Config(vocab_size=V, intermediate_size=128, tie_word_embeddings=True, **config))
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    B, prompt = 8, torch.randint(0, V, (8, 16))
    lengths, ids, mask = torch.full((B,), 16), torch.randint(0, V, (B, n)), torch.ones(B, n)

    def work():
        for rows in torch.arange(B).split(max(1, 2048 // (16 + n))):
            logp, _ = common.token_logprobs(model, prompt[rows], lengths[rows], ids[rows], mask[rows])
            logp.sum().backward()

    seconds, mib = watched(work)
    return {"seconds": seconds, "mib": mib}


def in_process(*arguments: str) -> dict:
    command = [sys.executable, __file__, "--measure", *arguments]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1])


def bench_logprobs(base: str, runs: int) -> list[dict]:
    """Time and peak memory of log-probs and entropy, forward and backward, from 2,048 hidden states."""
    names = ["ours", "naive"] + (["trl"] if installed("trl") else [])
    found = {name: [] for name in names}
    for _ in range(runs):
        for name in names:
            found[name].append(in_process("head", name))
    for name in names:
        assert all(
            abs(a - b) <= 1e-4 * abs(b)
            for a, b in zip(found[name][0]["check"], found["naive"][0]["check"], strict=True)
        )
    print("  same work: sums of log-probs, entropies and both gradients equal to 1e-4")
    rows = []
    for other in names[1:]:
        for key, unit in (("seconds", "s"), ("mib", "MiB")):
            pair = ([m[key] for m in found[name]] for name in ("ours", other))
            ours, theirs = pair
            rows.append(row(f"log-probs and entropy, {N} x {V}", unit, ours, other, theirs, False))
    return rows


def bench_growth(base: str, runs: int) -> list[dict]:
    """Peak memory of 8 completions of 256 tokens and of 1,024, at one token budget."""
    short, long = ([in_process("growth", n)["mib"] for _ in range(runs)] for n in ("256", "1024"))
    grown = (statistics.median(long) - statistics.median(short)) * 2**20 / (8 * (1024 - 256))
    print(f"  {grown:.0f} bytes for each of the {8 * 768} tokens more; float32 logits would take {4 * V}")
    return [row("log-probs of 8 x 1,024 tokens", "MiB", long, "8 x 256", short, False)]


def installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def main() -> None:
    benches = {
        "rollout": bench_rollout, "step": bench_step, "logprobs": bench_logprobs, "growth": bench_growth,
        "verifier": bench_verifier,
    }  # fmt: skip
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", choices=benches, default=list(benches))
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--base", default=None, help="checkpoint for rollout and step; without it: the tiny base")
    parser.add_argument("--model", default=None, help="folder of a real model with a chat template")
    parser.add_argument("--dataset", default=None, help="its problems: JSON lines with question and answer")
    parser.add_argument("--out", default=str(Path(__file__).with_name("results.json")))
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        kind, what = args.measure
        print(json.dumps(measure_head(what) if kind == "head" else measure_growth(what)))
        return
    from transformers.utils import logging

    logging.disable_progress_bar()
    packages = {p: installed(p) for p in ("torch", "transformers", "trl", "math-verify")}
    machine = {"processor": platform.processor() or platform.machine(), "threads": torch.get_num_threads(), **packages}
    print(machine)
    rows = []
    if args.model:
        rows = bench_model(args.model, args.dataset, args.runs, args.rows)
        args.rows = []
    base = args.base or (args.rows and str(arithmetic.base(ROOT / "runs" / "tiny-base")))
    for name in args.rows:
        needed = {"step": "trl", "verifier": "math-verify"}.get(name)
        if needed and not packages[needed]:
            print(f"{name}: {needed} is not installed (pip install -r requirements-dev.txt); not measured")
            continue
        rows += benches[name](base, args.runs)
    Path(args.out).write_text(json.dumps({"machine": machine, "command": sys.argv[1:], "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
