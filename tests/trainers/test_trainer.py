"""The trainer: a loss that does not depend on how a batch is split, the trained parts, and the logs."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import BertConfig, BertModel, TrainerCallback, default_data_collator

from modeling_unihyperlora import (
    BudgetError,
    ConfigError,
    UniHyperLoraConfig,
    UniHyperLoraForSequenceClassification,
    UniHyperLoraForTokenClassification,
)
from modeling_unihyperlora.measure.accounting import PARTS, part_of
from modeling_unihyperlora.storage import LATENTS_NAME
from trainers import UniHyperLoraTrainer, UniHyperLoraTrainingArguments
from trainers.training_args import LEARNING_RATE_FACTORS

LABELS = ["O", "B-A", "I-A"]
SENTENCES, TOKENS = 24, 6


def make_model(seed: int = 0, cls=UniHyperLoraForTokenClassification, dropout: float = 0.0, **config):
    """A tiny random host, the same at every call, and an adapter with random values in all parts."""
    torch.manual_seed(99)
    shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    drop = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    host = BertModel(BertConfig(vocab_size=40, **shape, **drop), add_pooling_layer=False)
    torch.manual_seed(seed)
    for parameter in host.parameters():
        if parameter.dim() == 2:
            nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(parameter.numel()))
    config = UniHyperLoraConfig(**{"pathway": "inject", "atoms": 16, "anchor_dim": 8, "mixer_hidden": 4} | config)
    model = cls.from_host(host, labels=LABELS, task="ner", config=config)
    with torch.no_grad():
        for name, parameter in model.adapter.named_parameters():
            if name == "router_bias.latent":
                parameter.copy_(0.3 * torch.randn_like(parameter) - 1)
            elif "waves" not in name:
                parameter.copy_(0.4 * torch.randn_like(parameter))
    return model


def make_data(count: int = SENTENCES, seed: int = 0, per_sentence: bool = False) -> list[dict]:
    """Sentences with very different numbers of labelled tokens; every fifth has none."""
    generator = torch.Generator().manual_seed(seed)
    data = []
    for number in range(count):
        ids = torch.randint(2, 40, (TOKENS,), generator=generator)
        length = 2 + number % (TOKENS - 1)
        mask = (torch.arange(TOKENS) < length).long()
        labels = torch.randint(0, 3, (TOKENS,), generator=generator)
        labels[(mask == 0) | (torch.rand(TOKENS, generator=generator) < number % 4 / 4)] = -100
        if number % 5 == 4:
            labels[:] = -100
        label = {"labels": number % 3} if per_sentence else {"labels": labels}
        data.append({"input_ids": ids, "attention_mask": mask, **label})
    return data


def make_trainer(folder, model=None, data=None, trainer: dict | None = None, **arguments) -> UniHyperLoraTrainer:
    settings = {
        "output_dir": str(folder),
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "seed": 0,
        "per_device_train_batch_size": 8,
        "per_device_eval_batch_size": 5,
        "max_steps": 3,
        "learning_rate": 0.1,
        "optim": "sgd",
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "max_flops_overhead_pct": 1000,
    }
    args = UniHyperLoraTrainingArguments(**settings | arguments)
    return UniHyperLoraTrainer(
        model=make_model() if model is None else model,
        args=args,
        train_dataset=make_data() if data is None else data,
        data_collator=default_data_collator,
        **trainer or {},
    )


def snapshot(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def changed(module: nn.Module, before: dict[str, torch.Tensor]) -> set[str]:
    return {name for name, tensor in module.state_dict().items() if not torch.equal(tensor, before[name])}


def losses(trainer) -> list[dict[str, float]]:
    return [entry for entry in trainer.state.log_history if "loss" in entry]


class StopAt(TrainerCallback):
    """Ends the run after a step, as a crash would."""

    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= self.step
        return control


class TestLoss:
    @pytest.mark.parametrize("lambda_f,lambda_q", [(0.05, 1e-5), (3.0, 0.5), (0.0, 0.0)])
    def test_terms_are_those_of_the_formula_and_logged_apart(self, lambda_f, lambda_q, tmp_path):
        model, data = make_model(), make_data(8)
        batch = default_data_collator(data)
        with torch.no_grad():
            out = model.eval()(**{name: x for name, x in batch.items() if name != "labels"})
        labelled = [(b, t) for b in range(8) for t in range(TOKENS) if batch["labels"][b, t] != -100]
        logits, atoms = out.logits.double(), out.expected_atoms.double()
        probabilities = [torch.softmax(logits[b, t], dim=-1)[batch["labels"][b, t]] for b, t in labelled]
        delta = model.adapter.tasks["ner"].delta().detach().double()
        expected = {
            "task_loss": float(sum(-torch.log(p) for p in probabilities)) / len(labelled),
            "lambda_f_loss": lambda_f * float(sum(atoms[b, t] for b, t in labelled)) / len(labelled),
            "lambda_q_loss": lambda_q * float((delta**2).sum()),
        }
        trainer = make_trainer(tmp_path, model, data, max_steps=1, lambda_f=lambda_f, lambda_q=lambda_q)
        trainer.train()
        (log,) = losses(trainer)
        for name, value in expected.items():
            assert log[name] == pytest.approx(value, rel=1e-4), name
        assert log["loss"] == pytest.approx(sum(expected.values()), rel=1e-4)
        assert delta.any() and len(labelled) > 5

    @pytest.mark.parametrize("logging_steps", [1, 3])
    @pytest.mark.parametrize("accumulation", [1, 2, 3])
    def test_logged_terms_add_up_to_the_loss(self, accumulation, logging_steps, tmp_path):
        """Also if an epoch ends with fewer micro-batches: 24 sentences make 5 batches of up to 5."""
        trainer = make_trainer(
            tmp_path,
            max_steps=9,
            per_device_train_batch_size=5,
            gradient_accumulation_steps=accumulation,
            logging_steps=logging_steps,
            lambda_q=0.1,
        )
        trainer.train()
        assert len(losses(trainer)) == 9 // logging_steps
        for log in losses(trainer):
            terms = [log[name] for name in ("task_loss", "lambda_f_loss", "lambda_q_loss")]
            assert all(term > 0 for term in terms)
            assert sum(terms) == pytest.approx(log["loss"], rel=1e-4)

    def test_a_second_run_logs_from_the_start(self, tmp_path):
        trainer = make_trainer(tmp_path, max_steps=1)
        trainer.train()
        trainer.train()
        for log in losses(trainer):
            terms = [log[name] for name in ("task_loss", "lambda_f_loss", "lambda_q_loss")]
            assert sum(terms) == pytest.approx(log["loss"], rel=1e-4)

    @pytest.mark.parametrize(
        "size,accumulation,smoothing,scope",
        [
            (4, 2, 0.0, "task"),
            (2, 4, 0.0, "task"),
            (1, 8, 0.0, "task"),
            (1, 8, 0.0, "delta"),
            (2, 4, 0.1, "task"),
        ],
    )
    def test_does_not_depend_on_how_a_batch_is_cut(self, size, accumulation, smoothing, scope, tmp_path):
        runs = []
        for per_device, steps in ((8, 1), (size, accumulation)):
            trainer = make_trainer(
                tmp_path,
                per_device_train_batch_size=per_device,
                gradient_accumulation_steps=steps,
                label_smoothing_factor=smoothing,
                train_scope=scope,
                lambda_f=0.5,
                lambda_q=0.01,
                learning_rate=0.05,
            )
            start = snapshot(trainer.model.adapter)
            trainer.train()
            assert changed(trainer.model.adapter, start)
            runs.append(trainer)
        whole, cut = (losses(trainer) for trainer in runs)
        assert len(whole) == 3
        for name in ("loss", "task_loss", "lambda_f_loss", "lambda_q_loss"):
            assert [log[name] for log in cut] == pytest.approx([log[name] for log in whole], abs=1e-5), name
        state = runs[1].model.adapter.state_dict()
        for name, tensor in runs[0].model.adapter.state_dict().items():
            if "mean_gate" not in name:  # a running mean over micro-batches depends on their number
                torch.testing.assert_close(state[name], tensor, atol=1e-5, rtol=1e-5, msg=name)

    def test_one_step_is_gradient_descent_on_it(self, tmp_path):
        """Compared with autograd over the whole batch, without the trainer."""
        model, by_hand, data = make_model(), make_model(), make_data(8)
        trainer = make_trainer(tmp_path, model, data, max_steps=1, lambda_f=0.5, per_device_train_batch_size=8)
        trainer.train()
        by_hand.set_train_scope("task")
        batch = default_data_collator(data)
        out = by_hand(**batch)
        labelled = batch["labels"] != -100
        (out.loss + 0.5 * out.expected_atoms[labelled].mean()).backward()
        after = model.adapter.state_dict()
        moved = 0.0
        for name, parameter in by_hand.adapter.named_parameters():
            rate = 0.1 * LEARNING_RATE_FACTORS[part_of(name)]
            expected = parameter.detach() - (rate * parameter.grad if parameter.grad is not None else 0)
            torch.testing.assert_close(after[name], expected, atol=1e-6, rtol=1e-5, msg=name)
            moved = max(moved, float((expected - parameter.detach()).abs().max()))
        assert moved > 1e-3

    def test_bfloat16_autocast_is_close(self, tmp_path):
        full, low = (make_trainer(tmp_path, bf16=bf16, lambda_f=0.5) for bf16 in (False, True))
        full.train()
        low.train()
        for one, two in zip(losses(full), losses(low), strict=True):
            assert two["loss"] == pytest.approx(one["loss"], rel=0.05)
        assert losses(full)[0]["loss"] != losses(low)[0]["loss"], "nothing ran in bfloat16"
        assert all(p.dtype == torch.float32 for p in low.model.adapter.parameters())

    def test_a_batch_without_any_label_does_no_harm(self, tmp_path):
        data = make_data(8)
        for row in data:
            row["labels"][:] = -100
        trainer = make_trainer(tmp_path, data=data, max_steps=2, lambda_q=0.1)
        before = snapshot(trainer.model)
        trainer.train()
        assert [log["loss"] for log in losses(trainer)] == [0.0, 0.0]
        assert not {name for name in changed(trainer.model, before) if "mean_gate" not in name}

    def test_sequence_classification_counts_sentences(self, tmp_path):
        model = make_model(cls=UniHyperLoraForSequenceClassification)
        data = make_data(8, per_sentence=True)
        batch = default_data_collator(data)
        with torch.no_grad():
            out = model.eval()(**batch)
        means = [float(out.expected_atoms[b][batch["attention_mask"][b] == 1].double().mean()) for b in range(8)]
        logs = []
        for size in (8, 2):
            trainer = make_trainer(
                tmp_path,
                make_model(cls=UniHyperLoraForSequenceClassification),
                data,
                max_steps=1,
                per_device_train_batch_size=size,
                gradient_accumulation_steps=8 // size,
                lambda_f=0.7,
            )
            trainer.train()
            logs.append(losses(trainer)[0])
        assert logs[0]["task_loss"] == pytest.approx(out.loss.item(), rel=1e-4)
        assert logs[0]["lambda_f_loss"] == pytest.approx(0.7 * sum(means) / 8, rel=1e-4)
        assert logs[1]["loss"] == pytest.approx(logs[0]["loss"], rel=1e-5)

    @pytest.mark.parametrize("arguments", [{"lambda_f": -0.1}, {"lambda_q": math.inf}, {"train_scope": "all"}])
    def test_bad_arguments_are_named(self, arguments, tmp_path):
        with pytest.raises(ConfigError, match=next(iter(arguments))):
            UniHyperLoraTrainingArguments(output_dir=str(tmp_path), **arguments)


class TestScope:
    def trained(self, tmp_path, scope: str, new_task: bool = False, **arguments):
        model = make_model()
        model.config.tasks["ner"]["trained"] = True
        model.add_task("other", LABELS)
        if not new_task:
            model.set_task("ner")
        before = snapshot(model)
        make_trainer(tmp_path, model, train_scope=scope, optim="adamw_torch", lambda_q=0.1, **arguments).train()
        return model, changed(model, before)

    SHARED = {
        "atoms_in.latent",
        "atoms_out.latent",
        "projector.inward_waves.latent",
        "projector.outward_waves.latent",
        "mixer.hidden.latent",
        "mixer.output.latent",
        "router_weight.latent",
        "router_bias.latent",
    }

    def test_task_trains_all_but_delta_and_other_tasks(self, tmp_path):
        _, names = self.trained(tmp_path, "task")
        leaves = {"embedding.latent", "head_weight.latent", "head_bias.latent", "mean_gate"}
        assert names == {f"adapter.{n}" for n in self.SHARED | {f"tasks.ner.{leaf}" for leaf in leaves}}

    def test_delta_trains_delta_alone(self, tmp_path):
        model, names = self.trained(tmp_path, "delta")
        assert names == {"adapter.tasks.ner.delta.latent"}
        assert model.adapter.tasks["ner"].delta().abs().max() <= 8 * 0.125

    def test_the_papers_recipe_moves_the_codes_of_delta(self, tmp_path):
        """500 steps at 2e-4 move δθ by less than 0.05; with a coarser grid the file would never change."""
        recipe = {"learning_rate": 2e-4, "max_steps": 500, "warmup_steps": 50, "lr_scheduler_type": "linear"}
        trainer = make_trainer(tmp_path, train_scope="delta", optim="adamw_torch", logging_steps=500, **recipe)
        delta = trainer.model.adapter.tasks[trainer.model.config.active_task].delta
        before = delta.encode()[""]
        trainer.train()
        assert (delta.encode()[""] != before).sum() > 10

    def test_delta_of_a_new_task_trains_its_head_too(self, tmp_path):
        _, names = self.trained(tmp_path, "delta", new_task=True)
        leaves = ("delta.latent", "head_weight.latent", "head_bias.latent", "mean_gate")
        assert names == {f"adapter.tasks.other.{leaf}" for leaf in leaves}

    @pytest.mark.parametrize("scope", ["task", "delta"])
    def test_host_gets_no_gradient(self, scope, tmp_path):
        model, _ = self.trained(tmp_path, scope, max_steps=1)
        assert all(p.grad is None and not p.requires_grad for p in model.host.parameters())

    def test_head_is_new_until_it_was_trained(self, tmp_path):
        model = make_model()
        make_trainer(tmp_path, model, max_steps=1).train()
        trainer = make_trainer(tmp_path, model, train_scope="delta")
        assert {n for n, p in trainer.model.named_parameters() if p.requires_grad} == {
            "adapter.tasks.ner.delta.latent"
        }


class TestOptimizer:
    INJECTED = set(PARTS) - {"space", "reader"}  # the parts of an adapter with the injected update
    RATES = {part: 10.0 ** -(i + 1) for i, part in enumerate(sorted(INJECTED))}

    def groups(self, trainer) -> dict[str, tuple[float, float]]:
        """Name of a parameter → its learning rate and weight decay."""
        names = {id(p): name for name, p in trainer.model.named_parameters()}
        found = {}
        for group in trainer.create_optimizer().param_groups:
            for parameter in group["params"]:
                assert names[id(parameter)] not in found, "in two groups"
                found[names[id(parameter)]] = group["lr"], group["weight_decay"]
        return found

    @pytest.mark.parametrize("scope", ["task", "delta"])
    def test_each_part_has_its_rate(self, scope, tmp_path):
        rates = {f"{part}_learning_rate": rate for part, rate in self.RATES.items()}
        trainer = make_trainer(tmp_path, train_scope=scope, weight_decay=0.3, **rates)
        found = self.groups(trainer)
        assert set(found) == {name for name, p in trainer.model.named_parameters() if p.requires_grad}
        for name, (rate, decay) in found.items():
            part = part_of(name.removeprefix("adapter."))
            assert rate == self.RATES[part], name
            assert decay == (0.0 if "bias" in name else 0.3), name
        assert {part_of(name.removeprefix("adapter.")) for name in found} == (
            self.INJECTED - {"delta"} if scope == "task" else {"delta", "head"}
        )

    def test_where_none_is_given_it_follows_from_the_common_one(self, tmp_path):
        assert set(LEARNING_RATE_FACTORS) == set(PARTS) - {"space"}, "the space is never trained"
        found = self.groups(make_trainer(tmp_path, learning_rate=0.7, router_learning_rate=0.0))
        for name, (rate, _) in found.items():
            part = part_of(name.removeprefix("adapter."))
            assert rate == (0.0 if part == "router" else 0.7 * LEARNING_RATE_FACTORS[part]), name

    def test_rates_follow_the_schedule_together(self, tmp_path):
        trainer = make_trainer(tmp_path, max_steps=4, lr_scheduler_type="linear", head_learning_rate=0.4)
        before = {name: rate for name, (rate, _) in self.groups(trainer).items()}
        trainer.add_callback(StopAt(2))
        trainer.train()
        after = {name: rate for name, (rate, _) in self.groups(trainer).items()}
        assert after == pytest.approx({name: rate / 2 for name, rate in before.items()})
        assert len(set(after.values())) > 2

    def test_a_part_with_rate_zero_stays(self, tmp_path):
        trainer = make_trainer(tmp_path, dictionary_learning_rate=0.0)
        before = snapshot(trainer.model.adapter)
        trainer.train()
        parts = {part_of(name) for name in changed(trainer.model.adapter, before)}
        assert parts == self.INJECTED - {"delta", "dictionary"}


class TestBudget:
    @pytest.mark.parametrize(
        "limit,match", [({"max_adapter_bytes": 2000}, r"bytes \(2,000"), ({"max_flops_overhead_pct": 10}, r"\(10 %")]
    )
    def test_over_it_nothing_is_trained(self, limit, match, tmp_path):
        model = make_model()
        before = [p.requires_grad for p in model.parameters()]
        with pytest.raises(BudgetError, match=match):
            make_trainer(tmp_path / "run", model, **limit)
        assert [p.requires_grad for p in model.parameters()] == before
        assert not (tmp_path / "run").exists()


class TestEvaluation:
    @staticmethod
    def by_hand(model, data) -> float:
        total, items = 0.0, 0
        with torch.no_grad():
            for row in data:
                out = model.eval()(row["input_ids"][None], row["attention_mask"][None])
                labelled = row["labels"] != -100
                total += float(out.active_atoms[0][labelled].double().sum())
                items += int(labelled.sum())
        return total / items

    def test_active_atoms_a_token(self, tmp_path):
        trainer = make_trainer(tmp_path)
        first, second = make_data(13, seed=1), make_data(9, seed=2)
        expected = [self.by_hand(trainer.model, data) for data in (first, second)]
        assert expected[0] != pytest.approx(expected[1], rel=1e-3)
        for _ in range(2):  # neither what was evaluated before nor training counts
            assert trainer.evaluate(first)["eval_active_atoms_per_token"] == pytest.approx(expected[0], rel=1e-5)
            metrics = trainer.predict(second, metric_key_prefix="predict").metrics
            assert metrics["predict_active_atoms_per_token"] == pytest.approx(expected[1], rel=1e-5)
        assert 0 < expected[0] <= 2

    def test_loss_is_that_of_training(self, tmp_path):
        data = make_data(5, seed=1)
        trainer = make_trainer(tmp_path, data=data, max_steps=1, lambda_f=0.5, lambda_q=0.1)
        before = trainer.evaluate(data)["eval_loss"]
        trainer.train()
        assert losses(trainer)[0]["loss"] == pytest.approx(before, rel=1e-5)

    def test_only_the_logits_are_gathered(self, tmp_path):
        data = make_data(9)
        predictions = make_trainer(tmp_path).predict(data).predictions
        assert predictions.shape == (9, TOKENS, 3)

    def test_changes_nothing(self, tmp_path):
        trainer = make_trainer(tmp_path)
        before = snapshot(trainer.model)
        trainer.evaluate(make_data(5))
        assert not changed(trainer.model, before)


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path):
    """The same six updates with 8 sentences in one process and with 4 in each of two, labels uneven between them."""
    here = Path(__file__)
    for processes in (1, 2):
        program = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes), "--standalone"]
        folder = tmp_path / str(processes)
        environment = os.environ | {
            "CUDA_VISIBLE_DEVICES": "",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join([str(here.parents[2]), os.environ.get("PYTHONPATH", "")]),
        }
        subprocess.run([*program, str(here), str(folder)], check=True, env=environment, timeout=300)
    one, two = (load_file(tmp_path / name / "checkpoint-6" / LATENTS_NAME) for name in ("1", "2"))
    for name, tensor in one.items():
        if "mean_gate" not in name:
            torch.testing.assert_close(two[name], tensor, atol=1e-5, rtol=1e-5, msg=name)
    logs = [(tmp_path / name / "losses.txt").read_text().split() for name in ("1", "2")]
    assert [float(x) for x in logs[1]] == pytest.approx([float(x) for x in logs[0]], abs=1e-5)
    assert len(logs[0]) == 24


def main(folder: Path) -> None:
    """One process of the test above."""
    processes = int(os.environ["WORLD_SIZE"])
    trainer = make_trainer(
        folder,
        max_steps=6,
        per_device_train_batch_size=8 // processes,
        save_strategy="steps",
        save_steps=6,
        lambda_f=0.5,
        lambda_q=0.01,
        learning_rate=0.05,
    )
    trainer.train()
    if trainer.is_world_process_zero():
        names = ("loss", "task_loss", "lambda_f_loss", "lambda_q_loss")
        (folder / "losses.txt").write_text(" ".join(str(log[name]) for log in losses(trainer) for name in names))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
