"""Problems to train and to evaluate on, and the model that is asked them.

Rows are {"question", "answer"}; `answer` is what verifier.gold_answer reads: GSM8K's text with `####`, a MATH solution
with \\boxed{}, or the bare answer. `datasets` and transformers load everything, and are imported where they are used.
"""

import math
import random
from pathlib import Path

import torch

import common
import distributed
import tiny
import verifier
from options import fail

QUESTION_COLUMNS = ("question", "problem", "prompt")
ANSWER_COLUMNS = ("answer", "reward_model", "solution")  # DAPO-Math-17k keeps its gold inside `reward_model`


def first_line(error: BaseException) -> str:
    error = error.__cause__ or error  # `datasets` wraps what was wrong
    return (str(error).strip() or type(error).__name__).splitlines()[0]


# --- the model --------------------------------------------------------------------------------------------------------


def load_model(name: str, device: torch.device, trust_remote_code: bool = False, gradient_checkpointing: bool = False):
    """A causal LM with float32 weights and its tokenizer, from the hub or a folder. Weights come from safetensors
    alone, and code that a checkpoint brings along is not run unless `trust_remote_code`."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
        for key, value in config.to_dict().items():
            if "drop" in key and isinstance(value, float):
                setattr(config, key, 0.0)  # with dropout, the policy that is scored is not the one that sampled
        options = dict(config=config, dtype=torch.float32, use_safetensors=True, trust_remote_code=trust_remote_code)
        model = AutoModelForCausalLM.from_pretrained(name, **options).to(device)
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
        common.check_head(model)
    except Exception as error:  # of any class: OSError, SafetensorError, JSONDecodeError ...
        where = "is not a folder here, and the hub gave: " if not Path(name).exists() else "cannot be used: "
        hint = " Give a local folder instead if the hub is out of reach." if not Path(name).exists() else ""
        fail(f"--model {name} {where}{first_line(error)}{hint}")
    if gradient_checkpointing:
        model.gradient_checkpointing_enable()
    return model, tokenizer


def stop_ids(model, tokenizer) -> list[int]:
    """The ids that end a completion: the tokenizer's EOS and those of the model's generation_config."""
    ids = model.generation_config.eos_token_id
    ids = {tokenizer.eos_token_id, *(ids if isinstance(ids, list) else [ids])} - {None}
    if not ids:
        fail("--model: neither its tokenizer nor its generation_config names an end-of-sequence token")
    return sorted(ids)


def prompt_ids(tokenizer, question: str, system: str, template: str) -> list[int]:
    """The question as the model is asked it: a system and a user turn of its chat template, or else `template`."""
    if not tokenizer.chat_template:
        return tokenizer(template.replace("{question}", question))["input_ids"]
    turns = [{"role": "system", "content": system}, {"role": "user", "content": question}]
    options = dict(add_generation_prompt=True, return_dict=False)
    try:
        return tokenizer.apply_chat_template(turns[not system :], **options)
    except Exception as error:  # jinja2's; Gemma's template, for one, has no system turn
        if "system" not in str(error).lower():
            raise
        return tokenizer.apply_chat_template([{"role": "user", "content": f"{system}\n\n{question}"}], **options)


def estimate_memory(cfg, model, prompt_length: int) -> dict[str, int]:
    """Bytes that the parts of a run will hold at once, roughly. The last two follow each other and do not add up."""
    config, gpu = model.config.get_text_config(), model.device.type == "cuda"
    D, layers, V = config.hidden_size, config.num_hidden_layers, config.vocab_size
    heads = config.num_attention_heads
    kv = (getattr(config, "num_key_value_heads", None) or heads) * (getattr(config, "head_dim", None) or D // heads)
    size = 2 if gpu else 4  # bytes of an activation
    weights = 4 * sum(p.numel() for p in model.parameters())
    share = distributed.world() if cfg.fsdp else 1
    reference = getattr(cfg, "kl_coef", 0) > 0  # a second model, of weights alone
    rows = -(-max(cfg.n_prompts * cfg.group_size, cfg.eval_rows * cfg.eval_k) // distributed.world())
    rows = min(cfg.rollout_rows, rows)
    cache = rows * (prompt_length + cfg.max_new_tokens) * 2 * layers * kv * size
    # Kept for the backward pass: in 16 bits about 34 D bytes a token and layer (Korthikanti et al., arXiv 2205.05198,
    # without the attention matrix), 2 D with checkpointing. Then the head: two float32 chunks and a weight gradient.
    chunk = max(common.CHUNK_ELEMENTS[model.device.type], V)
    kept = 2 if cfg.gradient_checkpointing else 34
    update = cfg.token_budget * layers * kept * D * size // 2 + 2 * 4 * chunk + 4 * V * D
    return {
        "weights, gradients, AdamW": (5 if reference else 4) * weights // share + (weights // 2 if gpu else 0),
        "rollout": cache + 4 * rows * V * 4 + (weights if cfg.fsdp else 0),
        "update": update,
    }


def check_memory(cfg, model, prompt_length: int) -> None:
    """Prints one line with the estimate, and refuses what cannot fit on the GPU."""
    parts = estimate_memory(cfg, model, prompt_length)
    n = sum(p.numel() for p in model.parameters())
    listed = ", ".join(f"{name} {size / 2**30:.2g}" for name, size in parts.items())
    print(f"{n:,} parameters on {model.device.type}; memory estimated in GiB: {listed}")
    if model.device.type == "cuda":
        fixed, rollout, update = parts.values()
        free = min(distributed.gather(torch.cuda.mem_get_info()[0])) + fixed // 4  # the weights are there already
        for needed, way_out in ((fixed, "a smaller --model"), (fixed + rollout, "a smaller --rollout-rows"),
                                (fixed + update, "a smaller --token-budget")):  # fmt: skip
            if needed > free:
                fail(f"about {needed / 2**30:.1f} GiB needed, {free / 2**30:.1f} GiB free: choose {way_out}")


# --- the problems -----------------------------------------------------------------------------------------------------


def open_dataset(flag: str, name: str, config: str | None, split: str):
    """One split of a hub data set, a JSON, JSON Lines or Parquet file, or a folder; None if there is no such split."""
    import datasets

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what goes wrong is said below, in one line
    path, kinds = Path(name), {".json": "json", ".jsonl": "json", ".parquet": "parquet"}
    try:
        if path.is_file():
            if path.suffix not in kinds:
                fail(f"{flag} {name}: a file must end in {', '.join(kinds)}")
            return datasets.load_dataset(kinds[path.suffix], data_files=str(path), split="train")
        if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
            saved = datasets.load_from_disk(name)
            if isinstance(saved, datasets.DatasetDict):
                return saved.get(split)
            return saved
        if not config:
            names = datasets.get_dataset_config_names(name)
            config = next((c for c in ("main", "default") if c in names), names[0])
        if split not in datasets.get_dataset_split_names(name, config):
            return None
        return datasets.load_dataset(name, config, split=split)
    except Exception as error:  # of any class: DatasetNotFoundError, ConnectionError, ArrowInvalid ...
        hint = "" if path.exists() else " Give a local file or folder instead if the hub is out of reach."
        fail(f"{flag} {name} cannot be loaded: {first_line(error)}{hint}")


def as_rows(flag: str, dataset, question: str | None, answer: str | None) -> list[dict]:
    """Rows of a data set whose columns have known names, or those given. A row without one of the two is refused."""
    columns = dataset.column_names
    question = question or next((c for c in QUESTION_COLUMNS if c in columns), None)
    answer = answer or next((c for c in ANSWER_COLUMNS if c in columns), None)
    for option, column in (("--question-column", question), ("--answer-column", answer)):
        if column not in columns:
            fail(f"{flag}: name one of its columns ({', '.join(columns)}) with {option}")
    rows = []
    for number, row in enumerate(dataset, 1):
        q, a = row[question], row[answer]
        if isinstance(q, list):  # a chat: what the user says last
            turns = [turn for turn in q if isinstance(turn, dict) and turn.get("role") == "user"]
            q = turns[-1].get("content") if turns else None
        if isinstance(a, dict):
            a = a.get("ground_truth")
        if q is None or a is None or not str(q).strip():
            fail(f"{flag}, line {number}: no {'answer' if a is None else 'question'} in its column")
        rows.append({"question": str(q), "answer": str(a)})
    return rows


def usable(flag: str, rows: list[dict]) -> list[dict]:
    """Each question once, and only answers that equal themselves; says what was dropped."""
    once = list({row["question"]: row for row in rows}.values())
    if len(once) < len(rows):
        print(f"{flag}: {len(rows) - len(once)} of {len(rows)} rows dropped, their questions come again further down")
    rows = once
    verdicts = [verifier.verifiable(row["answer"]) for row in rows]
    good, bad = ([row for row, v in zip(rows, verdicts, strict=True) if v is side] for side in (True, False))
    if bad:
        shown = "; ".join(repr(verifier.gold_answer(row["answer"])[:40]) for row in bad[:3])
        print(f"{flag}: {len(bad)} of {len(rows)} rows dropped, their answers cannot be verified: {shown}")
    if not good:
        fail(f"{flag}: none of its {len(rows)} rows has an answer that can be verified")
    return good


def load_rows(cfg) -> tuple[list[dict], list[dict]]:
    """Rows to train on and at most eval_rows to evaluate on, without a question in common.

    Evaluation rows come from --eval-dataset, else from the --eval-split of the data set, else they are held out.
    """
    columns, flag = (cfg.question_column, cfg.answer_column), f"--dataset {cfg.dataset}"
    if cfg.dataset == "arithmetic":
        train = tiny.problems(8192, cfg.seed, held_out=False)
    else:
        train = open_dataset("--dataset", cfg.dataset, cfg.dataset_config, cfg.train_split)
        if train is None:
            fail(f"{flag}: no split {cfg.train_split!r}; name one with --train-split")
        train = usable(flag, as_rows(flag, train, *columns))
        random.Random(0).shuffle(train)
    if not cfg.eval_rows:
        return train, []
    if (cfg.eval_dataset or cfg.dataset) == "arithmetic":
        held = tiny.problems(cfg.eval_rows, 0, held_out=True)
    elif cfg.eval_dataset or not Path(cfg.dataset).is_file():
        other, flag = cfg.eval_dataset or cfg.dataset, f"--eval-dataset {cfg.eval_dataset or cfg.dataset}"
        held = open_dataset("--eval-dataset", other, None if cfg.eval_dataset else cfg.dataset_config, cfg.eval_split)
        if held is None and (cfg.eval_dataset or cfg.eval_split != "test"):
            fail(f"{flag}: no split {cfg.eval_split!r}; name one with --eval-split")
        if held:  # a data set of its own may have other columns
            columns = [c if c in held.column_names or not cfg.eval_dataset else None for c in columns]
            held = usable(flag, as_rows(flag, held, *columns))
        random.Random(0).shuffle(held or [])
    else:
        held = None
    if not held:
        held, train = train[: cfg.eval_rows], train[cfg.eval_rows :]
        print(f"--dataset {cfg.dataset}: no split to evaluate on, so {len(held)} of its rows are held out")
    held = held[: cfg.eval_rows]
    asked = {" ".join(row["question"].split()) for row in held}
    kept = [row for row in train if " ".join(row["question"].split()) not in asked]
    if len(kept) < len(train):
        print(f"--dataset: {len(train) - len(kept)} rows dropped, their questions are also among those to evaluate on")
    if not kept:
        fail(f"--dataset {cfg.dataset}: no rows are left to train on beside --eval-rows {cfg.eval_rows}")
    return kept, held


def longest_completion(cfg) -> int:
    """--max-new-tokens, or what is enough for the data set."""
    return cfg.max_new_tokens or (64 if cfg.dataset == "arithmetic" else 512)


def encode(cfg, model, tokenizer, rows: list[dict]) -> list[dict]:
    """Adds "prompt_ids" to rows; drops those too long for --max-prompt-tokens or for the model's positions."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", math.inf)
    longest = min(cfg.max_prompt_tokens, limit - cfg.max_new_tokens)
    if longest < 1:
        fail(f"--max-new-tokens {cfg.max_new_tokens}: no room for a prompt in the model's {limit} positions")
    if not tokenizer.chat_template and "{question}" not in cfg.prompt_template:
        fail(f"--prompt-template {cfg.prompt_template!r}: it must say where the question goes, by {{question}}")
    rows = [
        {**row, "prompt_ids": prompt_ids(tokenizer, row["question"], cfg.system, cfg.prompt_template)} for row in rows
    ]
    kept = [row for row in rows if len(row["prompt_ids"]) <= longest]
    if len(kept) < len(rows):
        print(
            f"{len(rows) - len(kept)} of {len(rows)} rows dropped, their prompts are longer than {longest:.0f} tokens"
        )
    if rows and not kept:
        shortest = min(len(row["prompt_ids"]) for row in rows)
        fail(f"every prompt is longer than {longest:.0f} tokens (the shortest has {shortest}): "
             "give a larger --max-prompt-tokens or a smaller --max-new-tokens")  # fmt: skip
    return kept


def order(n: int, seed: int, epoch: int) -> list[int]:
    """The order of n training rows, the epoch-th time through them."""
    return random.Random(f"{seed}-{epoch}").sample(range(n), n)


def texts(tokenizer, rollout: common.Rollout, rows: list[dict]) -> list[dict]:
    """What people read of each completion: question, answer, completion. rows: one a prompt, in the rollout's order."""
    kept = zip(rollout.completion_ids.tolist(), rollout.lengths().long().tolist(), strict=True)
    completions = tokenizer.batch_decode([ids[:n] for ids, n in kept], skip_special_tokens=True)
    asked = (row for row in rows for _ in range(len(rollout) // len(rows)))
    return [
        {"question": row["question"], "answer": row["answer"], "completion": text}
        for text, row in zip(completions, asked, strict=True)
    ]
