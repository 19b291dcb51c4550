"""What fills the page of credit: the numbers of a rollout, and text that cannot become markup. No browser here."""

import json
import re
from types import SimpleNamespace

import pytest
import torch

from common import Rollout
from experiments import credit

NASTY = ["</script><script>alert(1)</script>", "<!--", "&amp;", "</body>", "<img src=x onerror=alert(1)>", r"$\frac$"]


def rollout(lengths=(5, 3, 6, 4, 2, 6), right=(1, 0, 1, 0, 0, 0), group_size=2, width=6):
    """Random log-probs and entropies; completions of these lengths, whose token ids count up from 0."""
    torch.manual_seed(0)
    lengths, B = torch.tensor(lengths), len(lengths)
    mask = (torch.arange(width) < lengths[:, None]).float()
    return Rollout(
        prompt_ids=torch.zeros(B, 1, dtype=torch.long),
        prompt_lengths=torch.ones(B, dtype=torch.long),
        completion_ids=torch.arange(width).repeat(B, 1),
        mask=mask,
        logprobs=-torch.rand(B, width) * mask,
        entropy=torch.rand(B, width) * mask,
        finished=lengths < width,
        group=torch.arange(B) // group_size,
        rewards=torch.tensor(right, dtype=torch.float32),
        records=[{"question": NASTY[0], "answer": "#### 7", "completion": ""}] * B,
    )


def tokenizer(texts):
    """Its token id k reads texts[k]."""
    return SimpleNamespace(decode=lambda ids, skip_special_tokens: texts[ids[0]])


def test_the_page_gets_the_numbers_of_a_group_right_ones_first():
    r = rollout(right=(1, 0, 0, 1, 0, 0))
    shown = credit.prompt_content(r, 1, tokenizer("abcdef"))
    for row, i in zip(shown["rows"], (3, 2), strict=True):
        n = int(r.completion_lengths()[i])
        assert row["reward"] == r.rewards[i]
        assert row["logprob"] == pytest.approx(r.logprobs[i, :n].tolist(), abs=1e-4)
        assert row["entropy"] == pytest.approx(r.entropy[i, :n].tolist(), abs=1e-4)
    assert shown["answer"] == "7"


def test_the_group_nearest_to_half_right_is_chosen():
    group = torch.arange(3).repeat_interleave(4)
    assert credit.choose(torch.tensor([1.0, 1, 1, 0, 0, 1, 1, 0, 1, 1, 0, 0]), group) == 1
    assert credit.choose(torch.tensor([1.0, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 1]), group) == 2
    assert credit.choose(torch.tensor([1.0, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0]), group) is None
    # and the page shows another one that is harder
    rewards = torch.tensor([0.0, 0, 0, 0, 1, 0, 0, 0, 1, 1, 0, 0])
    assert credit.choose(rewards, group, share=0.2, without=2) == 1
    assert credit.choose(rewards, group, share=0.2, without=1) == 2
    assert credit.choose(rewards[:8], group[:8], share=0.2, without=1) is None


def test_cells_show_what_has_no_glyph():
    for text, shown in {" a": "a", "\n\n": "⏎⏎", "\t": "⇥", "  ": "␣", "": "␣", "\x1b[": "�["}.items():
        assert credit.visible(text, False) == shown
    assert credit.visible("<eos>", True) == "∎"
    ended = credit.prompt_content(rollout(), 0, tokenizer("abcdef"))["rows"][0]
    cut = credit.prompt_content(rollout(lengths=(6, 3), right=(1, 0)), 0, tokenizer("abcdef"))["rows"][0]
    assert ended["shown"][-1] == "∎" and ended["text"][-1] == "e"
    assert cut["shown"][-1] == "f"


def page(*prompts):
    return credit.page([{"task": "a task", "model": "a model", "max_new_tokens": 6, "groups": list(prompts)}])


def prompt(texts=tuple("abcdef")):
    return credit.prompt_content(rollout(lengths=(6, 6), right=(1, 0)), 0, tokenizer(texts))


def test_the_page_is_one_file_that_loads_nothing_and_text_cannot_become_markup():
    written = page(prompt(NASTY))
    assert not re.search(r"https?:|//\w+\.|src=|href=|url\(|@import|fetch\(|import\(|XMLHttpRequest", page(prompt()))
    assert "default-src 'none'" in written
    assert written.count("<") == page(prompt()).count("<")
    (group,) = groups_of(written)
    assert group == prompt(NASTY) and group["rows"][0]["text"] == NASTY
    # and the script of the page writes it as text only
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(", written)


def groups_of(written):
    """The groups that a page holds."""
    (task,) = json.loads(re.search(r'id="content">(.*?)</script>', written, re.S).group(1))["tasks"]
    return task["groups"]


@pytest.fixture()
def sizes(toy, toy_data):
    """Options of toy size."""
    size = "--n-prompts 16 --group-size 4 --max-new-tokens 12"
    return ["--model", str(toy), "--dataset", str(toy_data), *size.split()]


@pytest.mark.slow
def test_the_script_writes_the_page(sizes, tmp_path, capsys):
    path = tmp_path / "deep" / "page.html"
    credit.main([*sizes, "--out", str(path)])
    assert capsys.readouterr().out.splitlines()[-1] == str(path)
    assert list(path.parent.iterdir()) == [path]  # no run folder
    for group in groups_of(path.read_text(encoding="utf-8")):
        assert {row["reward"] for row in group["rows"]} == {1.0, 0.0}
        assert len(group["rows"]) == 4


@pytest.mark.parametrize("wrong, said", [
    (["--alpha", 1], "--alpha"), (["--dataset", "nowhere.jsonl"], "nowhere.jsonl"),
    (["--out", __file__ + "/x"], "--out"), (["--temperature", 0.001], "no prompt has both outcomes"),
    (["--word-problems", "nowhere"], "--word-problems"),
])  # fmt: skip
def test_wrong_input_is_one_line_and_status_2(sizes, refusal, wrong, said):
    assert said in refusal(credit.main, [*sizes, *map(str, wrong)])
