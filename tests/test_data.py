"""Data sets in the layouts that people have, prompts, and model families."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import common
import data
import grpo
import tiny
import verifier
from options import RunConfig

SHARED = Path(__file__).parent.parent.parent / "shared" / "data"

GSM8K = [
    {
        "question": "A pen costs $2 and a pad $3. What do 4 pens and a pad cost?",
        "answer": "4 * 2 = <<4*2=8>>8\n#### 11",
    },
    {
        "question": "A hall has 25 rows of 40 seats. How many seats?",
        "answer": "25 * 40 = <<25*40=1000>>1,000\n#### 1,000",
    },
    {"question": "Half of a dozen eggs break. How many are left?", "answer": "12 / 2 = 6\n#### 6"},
]
MATH = [
    {"problem": "Solve $2x = 1$.", "solution": r"So $x = \boxed{\frac{1}{2}}$.", "answer": r"\frac{1}{2}", "level": 1},
    {
        "problem": "Which day follows Monday?",
        "solution": r"\boxed{\text{Tuesday}}",
        "answer": r"\text{Tuesday}",
        "level": 1,
    },
]
DAPO_17K = [
    {
        "data_source": "math_dapo",
        "prompt": [{"role": "user", "content": f"Solve it. What is {n} + 1? Answer on a last line."}],
        "reward_model": {"ground_truth": str(n + 1), "style": "rule"},
    }
    for n in range(4)
]


def config(**options):
    return SimpleNamespace(**{**vars(RunConfig()), "max_new_tokens": 8, **options})


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def stopped(capsys):
    message = capsys.readouterr().err.strip()
    assert message.startswith("error: ") and "\n" not in message
    return message


# --- layouts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows, golds", [(GSM8K, ["11", "1,000", "6"]), (MATH, [r"\frac{1}{2}", r"\text{Tuesday}"]),
                                         (DAPO_17K, ["1", "2", "3", "4"])])  # fmt: skip
@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet", "saved", "saved dict"])
def test_known_layouts_load_in_every_format(rows, golds, kind, tmp_path):
    import datasets

    path = str(tmp_path / f"rows.{kind}")
    built = datasets.Dataset.from_list(rows)
    if kind == "jsonl":
        write(tmp_path / "rows.jsonl", rows)
    elif kind == "json":
        Path(path).write_text(json.dumps(rows))
    elif kind == "parquet":
        built.to_parquet(path)
    else:
        path = str(tmp_path / "folder")
        (datasets.DatasetDict(train=built) if kind == "saved dict" else built).save_to_disk(path)
    train, held = data.load_rows(config(dataset=path, eval_rows=0))
    assert sorted(verifier.gold_answer(row["answer"]) for row in train) == sorted(golds) and held == []
    assert all(isinstance(row["question"], str) and row["question"] for row in train)


def test_columns_can_be_named(tmp_path, capsys):
    path = write(tmp_path / "a.jsonl", [{"text": "1+1?", "gold": "2"}, {"text": "1+2?", "gold": "3"}])
    train, held = data.load_rows(config(dataset=path, question_column="text", answer_column="gold", eval_rows=1))
    assert {row["answer"] for row in train + held} == {"2", "3"}
    with pytest.raises(SystemExit):
        data.load_rows(config(dataset=path))
    assert "--question-column" in stopped(capsys)
    other = write(tmp_path / "b.jsonl", GSM8K)  # with the usual names, whatever those of the first are called
    _, held = data.load_rows(
        config(dataset=path, eval_dataset=other, eval_rows=9, question_column="text", answer_column="gold")
    )
    assert len(held) == 3


def test_splits(tmp_path, capsys):
    import datasets

    built = datasets.DatasetDict(train=datasets.Dataset.from_list(GSM8K), test=datasets.Dataset.from_list(GSM8K[:1]))
    built.save_to_disk(tmp_path / "d")
    train, held = data.load_rows(config(dataset=str(tmp_path / "d")))
    assert [row["question"] for row in held] == [GSM8K[0]["question"]] and len(train) == 2
    with pytest.raises(SystemExit):
        data.load_rows(config(dataset=str(tmp_path / "d"), train_split="training"))
    assert "--train-split" in stopped(capsys)
    with pytest.raises(SystemExit):
        data.load_rows(config(dataset=str(tmp_path / "d"), eval_split="tset"))
    assert "--eval-split" in stopped(capsys)


def test_a_hub_data_set_with_configurations(tmp_path):
    """openai/gsm8k's layout: two configurations, of which `main` is meant, with a test split to evaluate on."""
    import datasets

    folder, yaml = tmp_path / "gsm8k", ["---", "configs:"]
    for name in ("socratic", "main"):
        (folder / name).mkdir(parents=True)
        yaml += [f"- config_name: {name}", "  data_files:"]
        for split, rows in (("train", GSM8K[:2]), ("test", GSM8K[2:])):
            rows = [{**row, "question": f"{name}: {row['question']}"} for row in rows]
            datasets.Dataset.from_list(rows).to_parquet(folder / name / f"{split}-00000-of-00001.parquet")
            yaml += [f"  - split: {split}", f"    path: {name}/{split}-*"]
    (folder / "README.md").write_text("\n".join([*yaml, "---", ""]))
    train, held = data.load_rows(config(dataset=str(folder)))
    assert len(train) == 2 and len(held) == 1 and all("main: " in row["question"] for row in train + held)
    train, _ = data.load_rows(config(dataset=str(folder), dataset_config="socratic"))
    assert all("socratic: " in row["question"] for row in train)


def test_training_and_evaluation_never_share_a_question(tmp_path, capsys):
    train = write(tmp_path / "train.jsonl", GSM8K)
    same = [{**GSM8K[1], "question": "  A hall has 25 rows  of 40 seats.\nHow many seats?"}]
    kept, held = data.load_rows(config(dataset=train, eval_dataset=write(tmp_path / "eval.jsonl", same)))
    assert len(held) == 1 and GSM8K[1]["question"] not in [row["question"] for row in kept] and len(kept) == 2
    assert "1 rows dropped" in capsys.readouterr().out
    for seed in range(3):
        rows, held = data.load_rows(config(dataset="arithmetic", seed=seed))
        assert not {row["question"] for row in rows} & {row["question"] for row in held}


def test_the_built_in_task_can_be_evaluated_on_something_else(tmp_path):
    train, held = data.load_rows(config(eval_dataset=write(tmp_path / "eval.jsonl", GSM8K)))
    assert len(train) == 8192 and {row["question"] for row in held} == {row["question"] for row in GSM8K}


def test_questions_that_come_twice_are_dropped_and_counted(tmp_path, capsys):
    train, _ = data.load_rows(config(dataset=write(tmp_path / "a.jsonl", [*GSM8K, GSM8K[0]]), eval_rows=0))
    assert len(train) == 3 and "1 of 4 rows dropped" in capsys.readouterr().out


def test_answers_that_cannot_be_verified_are_dropped_and_counted(tmp_path, capsys):
    bad = [{"question": "Why?", "answer": "because it was raining all day long"}, {"question": "Who?", "answer": ""}]
    train, _ = data.load_rows(config(dataset=write(tmp_path / "a.jsonl", GSM8K + bad), eval_rows=0))
    assert len(train) == 3 and "2 of 5 rows dropped" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        data.load_rows(config(dataset=write(tmp_path / "b.jsonl", bad), eval_rows=0))
    assert "none of its 2 rows" in stopped(capsys)


def test_overlong_prompts_are_dropped_and_counted(capsys):
    tokenizer, model = tiny.new_tokenizer(), tiny.new_model(tiny.new_tokenizer(), 0)
    rows = [{"question": "1+2?", "answer": "3"}, {"question": "1+2+3+4+5+6?", "answer": "21"}]
    assert len(data.encode(config(max_prompt_tokens=6), model, tokenizer, rows)) == 1
    assert "1 of 2 rows dropped" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        data.encode(config(max_prompt_tokens=2), model, tokenizer, rows)
    assert "--max-prompt-tokens" in stopped(capsys)
    with pytest.raises(SystemExit):
        data.encode(config(max_new_tokens=model.config.max_position_embeddings), model, tokenizer, rows)
    assert "--max-new-tokens" in stopped(capsys)


def test_the_hub_out_of_reach_is_one_line_with_the_way_out(capsys):
    with pytest.raises(SystemExit) as stop:
        data.load_rows(config(dataset="openai/no-such-set-here"))
    assert stop.value.code == 2 and "local file or folder" in stopped(capsys)
    with pytest.raises(SystemExit) as stop:
        data.load_model("Qwen/no-such-model-here", torch.device("cpu"))
    assert stop.value.code == 2 and "local folder" in stopped(capsys)


@pytest.mark.parametrize("name, count", [("gsm8k/train", 7473), ("gsm8k/test", 1319), ("math500/test", 500),
                                         ("aime/aime24", 30), ("aime/aime25", 30)])  # fmt: skip
def test_real_data(name, count):
    path = SHARED / f"{name}.jsonl"
    if not path.exists():
        pytest.skip("the data set is not here")
    train, _ = data.load_rows(config(dataset=str(path), eval_rows=0))
    assert len(train) == count


# --- prompts ----------------------------------------------------------------------------------------------------------


def test_prompts(capsys):
    tokenizer = tiny.new_tokenizer()

    def asked(system="think"):
        return tokenizer.decode(data.prompt_ids(tokenizer, "1+2", system, "3+{question}="))

    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role[0] }}{{ m.content }}{% endfor %}{{ '?' if add_generation_prompt }}"
    )
    unknown = tokenizer.unk_token
    assert asked().replace(unknown, "").endswith("1+2?") and asked() != asked(system="")
    tokenizer.chat_template = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no System role') }}{% endif %}"
        + ("{{ messages[0].content }}?")
    )
    assert asked("7").endswith("7\n\n1+2?")
    tokenizer.chat_template = None
    assert asked() == "3+1+2="
    with pytest.raises(SystemExit):
        data.encode(config(prompt_template="{q}?"), tiny.new_model(tokenizer, 0), tokenizer, [{"question": "1+2?"}])
    assert "--prompt-template" in stopped(capsys)


# --- families ---------------------------------------------------------------------------------------------------------

SMALL = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
             head_dim=8, max_position_embeddings=64)  # fmt: skip
FAMILIES = {
    "Qwen2": dict(SMALL, tie_word_embeddings=True),
    "Qwen3": dict(SMALL, tie_word_embeddings=False),
    "Llama": dict(SMALL, tie_word_embeddings=False),
    "Mistral": dict(SMALL, sliding_window=8),
    "Gemma2": dict(SMALL, final_logit_softcapping=3.0, sliding_window=8, query_pre_attn_scalar=8),
    "Gemma3Text": dict(SMALL, sliding_window=8, query_pre_attn_scalar=8),
    "Cohere": dict(SMALL, logit_scale=0.25),
    "Granite": dict(SMALL, logits_scaling=4.0),
    "GPT2": dict(n_embd=32, n_layer=2, n_head=4, n_positions=64),
    "Phi": dict(SMALL),  # a bias in its head
}


def checkpoint(family, folder):
    """A random model of the family, written with the tiny task's tokenizer."""
    import transformers

    tokenizer = tiny.new_tokenizer()
    ids = dict(vocab_size=len(tokenizer), pad_token_id=0, bos_token_id=None, eos_token_id=tokenizer.eos_token_id)
    torch.manual_seed(0)
    settings = getattr(transformers, f"{family}Config")(**FAMILIES[family], **ids)
    model = transformers.AutoModelForCausalLM.from_config(settings)
    for p in model.parameters():  # far from a uniform distribution, so that a forgotten factor shows
        p.data = p.data * 3 if p.dim() == 2 else p.data + 0.1 * torch.randn_like(p)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_family(family, gradient_checkpointing, tmp_path):
    """Sampling and scoring agree, one step trains, and what was saved loads again."""
    cpu = torch.device("cpu")
    model, tokenizer = data.load_model(
        checkpoint(family, tmp_path / "a"), cpu, gradient_checkpointing=gradient_checkpointing
    )
    prompts = tokenizer(["1+2?", "12+3-4+5-6+7?", "9-8?"])["input_ids"]
    uniforms = torch.rand(12, 20, generator=torch.Generator().manual_seed(0))
    r = common.sample(model, prompts, 4, 20, data.stop_ids(model, tokenizer), uniforms, temperature=0.8)
    fixed = common.sample(
        model, prompts, 4, 20, data.stop_ids(model, tokenizer), uniforms, temperature=0.8, fixed=True
    )  # fixed shapes, or where its attention does not allow them the plain loop
    assert torch.equal(fixed.mask, r.mask)
    torch.testing.assert_close(fixed.logprobs, r.logprobs, atol=2e-4, rtol=1e-4)
    logprobs, entropy = common.score(model, r, 0.8, 100)
    torch.testing.assert_close(logprobs, r.logprobs, atol=2e-4, rtol=1e-4)
    torch.testing.assert_close(entropy, r.entropy, atol=2e-4, rtol=1e-4)

    full, row = model(torch.cat([r.prompt_ids[4], r.completion_ids[4]])[None]).logits[0].detach(), int(r.mask[4].sum())
    P = len(prompts[1])
    expected = (full[P - 1 : P - 1 + row] / 0.8).log_softmax(-1).gather(1, r.completion_ids[4, :row, None]).squeeze(1)
    torch.testing.assert_close(r.logprobs[4, :row], expected, atol=2e-4, rtol=1e-4)  # and with the model's own logits

    r.rewards = (torch.arange(12) % 2).float()
    A = grpo.advantages(r.rewards, r.group)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)
    before = [p.detach().clone() for p in model.parameters()]

    def objective(new, old, rows):
        return grpo.loss(new, old, A[rows], r.mask[rows]), {}

    metrics = common.update(model, optimizer, scheduler, r, objective, "token", A, 0.8, token_budget=100)
    assert metrics["grad_norm"] > 0 and metrics["skipped_updates"] == 0
    assert any(not torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
    model.save_pretrained(tmp_path / "b")
    tokenizer.save_pretrained(tmp_path / "b")
    again, _ = data.load_model(str(tmp_path / "b"), cpu)
    for a, b in zip(again.parameters(), model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_head_gradients_with_scale_cap_and_bias():
    """fast.HeadLogprobs against autograd, in float64."""
    import fast

    g = torch.Generator().manual_seed(0)
    hidden, weight, bias = (torch.randn(*s, generator=g, dtype=torch.float64) for s in ((5, 4), (7, 4), (7,)))
    targets = torch.tensor([0, 3, 6, 1, 1])

    def plain(hidden, weight, bias):
        z = (hidden @ weight.T + bias) * 0.5
        logp = (torch.tanh(z / 2) * 2 / 0.7).log_softmax(-1)
        return logp.gather(1, targets[:, None]).squeeze(1), -(logp.exp() * logp).sum(-1)

    results = []
    for function in (plain, lambda *x: fast.HeadLogprobs.apply(*x, targets, 0.7, 0.5, 2.0, 2)):
        inputs = [x.clone().requires_grad_() for x in (hidden, weight, bias)]
        logp, entropy = function(*inputs)
        (logp * torch.arange(1, 6)).sum().add(entropy.sum() * 0.3).backward()
        results.append([logp, entropy, *(x.grad for x in inputs)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a.double(), b.double(), atol=1e-5, rtol=1e-5)


def test_no_end_token_is_refused(tmp_path, capsys):
    model, tokenizer = data.load_model(checkpoint("Qwen3", tmp_path / "a"), torch.device("cpu"))
    assert data.stop_ids(model, tokenizer) == [tokenizer.eos_token_id]
    model.generation_config.eos_token_id = [5, 6]
    assert data.stop_ids(model, tokenizer) == sorted({5, 6, tokenizer.eos_token_id})
    tokenizer.eos_token, model.generation_config.eos_token_id = None, None
    with pytest.raises(SystemExit):
        data.stop_ids(model, tokenizer)
    assert "end-of-sequence" in stopped(capsys)


def test_pickled_weights_are_refused(tmp_path, capsys):
    folder = Path(checkpoint("Qwen3", tmp_path / "a"))
    from safetensors.torch import load_file

    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(SystemExit):
        data.load_model(str(folder), torch.device("cpu"))
    assert "safetensors" in stopped(capsys)
