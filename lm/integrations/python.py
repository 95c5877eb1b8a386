"""A run from Python: `lm.load` reads its data, and what it returns trains, samples, evaluates and shows itself.

Each call makes what is missing of the run up to there and finds the rest finished, as the commands do: the stages of
`lm.stages` are called, in the folder of the run, under its lock. `docs/python.md` walks through it.
"""

from __future__ import annotations

import contextlib
import html
import io
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from datasets import Dataset
from rich.console import Console
from rich.table import Table
from rich.text import Text

from figures import methods as overview
from figures.record import MethodResult, PolicyResult, Results, read
from figures.style import style
from lm.base import ranks
from lm.base.command import only_run_in, quietened
from lm.base.options import parse_values
from lm.config import SFT, Config, check_seed
from lm.data.control_tokens import Names
from lm.data.messages import Message
from lm.data.templates import chat_renderer
from lm.data.tokens import completion_ids, prompt_ids
from lm.judging.reading import sample_text
from lm.logprobs.completions import CompletionModel
from lm.logprobs.sampling import sample_completions
from lm.logprobs.scoring import score_rows
from lm.models.opening import open_policy, open_reward_model
from lm.objectives import MAIN
from lm.reporting.cautions import Caution, cautions
from lm.reporting.curves import svg
from lm.reporting.results import comparisons, results, table, write
from lm.stages.data import SETS, SPLITS, data, given_pairs, lines, opened, sized, tokenizer
from lm.stages.evaluations import asked_of, trained_policy
from lm.stages.labels import exact_judge, open_oracle
from lm.stages.readings import reader, sized_for, text_rewards
from lm.stages.rewards import reward
from lm.stages.run import Run
from lm.stages.scores import export_rows
from lm.stages.subsets import members
from theory.records import write_text

Prompt = str | Sequence[Message]
"""Text, or messages, which the model's chat template writes."""
ORACLE = "oracle"


def load(*configs: str | Path, **options: Any) -> Loaded:
    """A run of these options, with its data read, split and tokenised, or found so.

    Args:
        configs: presets by name, or YAML files, of which later ones win; without any, what `lm.train` would take.
        options: as a YAML file has them (`lm.config` lists all): `output_dir="runs/mine"`, `methods=["dpo", "e-dpo"]`,
            `data={"kind": "preferences", "path": "pairs.jsonl"}`, `e_dpo={"beta": 0.3}`. They win over configs.

    Raises:
        ValueError: an option that is unknown, of a wrong kind, or that the run would pass over; a set or model that is
            nowhere, or unfit; or the folder is in use by another run.
        FileNotFoundError: a file of data that is not there.
    """
    for one in configs:
        if not isinstance(one, str | Path):
            raise ValueError(
                f"configs are presets by name, or files, got {one!r}; options go by name, as data={{...}}, seed=1"
            )
    config, resolved = parse_values([str(one) for one in configs], options)
    with quietened(), ranks.together(config.device, config.host_timeout), only_run_in(Path(config.output_dir)):
        run = Run(config)
        data(run)
    return Loaded(run, resolved)


def show(folder: str | Path) -> Evaluated:
    """The results of a finished run, from its `output_dir`.

    Raises:
        FileNotFoundError, ValueError: there is no results.json, or it is not as `figures.record.read` needs it.
    """
    return Evaluated(read(Path(folder) / "results.json"), Path(folder))


class Loaded:
    """A run whose data is read. Shows what was read of it, and what was left out.

    Args:
        run: what the stages of `lm.stages` are functions of, for whoever wants one that is not here.
        resolved: YAML of its options, which every call writes into the folder as commands do.
    """

    def __init__(self, run: Run, resolved: str) -> None:
        self.run, self._resolved = run, resolved

    @property
    def options(self) -> Config:
        """All options, with the defaults of those that were not said."""
        return self.run.config

    @contextlib.contextmanager
    def _at_work(self) -> Iterator[None]:
        folder = Path(self.options.output_dir)
        with quietened(), ranks.together(self.options.device, self.options.host_timeout), only_run_in(folder):
            if ranks.is_first():
                write_text(folder / "config.yaml", self._resolved)
            yield

    def pairs(self, split: str = "train") -> Dataset:
        """The pairs of a split as they were read: id, prompt, chosen and rejected, their token ids (`prompt_ids`,
        `chosen_ids`, `rejected_ids`, end-of-text included), and labels where they are soft. ValueError for no split."""
        if split not in SPLITS:
            raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
        with self._at_work():
            return given_pairs(self.run, split)

    def score(self) -> Dataset:
        """The training pairs, scored, a row each as `lm.export` writes them: rewards of both sides by the models that
        the run's methods distil (on each model's own scale) and summed log-probs under pi_ref (nats)."""
        with self._at_work():
            return Dataset.from_list(list(export_rows(self.run)))

    def train(self, method: str) -> Policy:
        """The policy of one of the run's methods, or pi_ref for "sft": trained, or found so. Of several settings or
        snapshots, the one that validation chooses. ValueError for a method that the run's options do not name."""
        if method not in (known := [*self.options.methods, SFT]):
            raise ValueError(
                f"method must be one of {', '.join(known)}, got {method!r}; lm.load(methods=[...]) names them"
            )
        with self._at_work():
            artifact, folder = trained_policy(self.run, method)
            return Policy(self, method, folder, artifact.metrics["history"])

    def rewards(
        self, prompts: Sequence[Prompt], completions: Sequence[str], model: str = ORACLE
    ) -> npt.NDArray[np.float64]:
        """Rewards of N completions, [N], on the model's own scale.

        A model with another tokenizer than the policy reads the texts by its own: messages, and prompts that
        `pairs` has of messages, by its own chat template. What is longer than it takes loses its beginning.

        Args:
            prompts: N, text or messages.
            completions: N; end-of-text is put after each.
            model: "oracle" judges; "rho" is the reward model of the training pairs, "b0.2" one of the ensemble.

        Raises:
            ValueError: there is no such model, numbers of prompts and completions differ, or a text is longer than the
                positions of a model with the policy's tokenizer.
            FloatingPointError: a reward is not finite.
        """
        distilled = [MAIN, *members(self.run)] if self.options.data.rewards == "models" else []
        if model not in (known := [ORACLE, *distilled]):
            raise ValueError(f"model must be one of {', '.join(known)}, got {model!r}")
        ids = self._ids(prompts, completions)
        if model == ORACLE and (exact := exact_judge(self.run)) is not None:
            texts = (str(prompt) for prompt in prompts)  # the embedded world's: no messages
            return np.array([exact(*both) for both in zip(texts, completions, strict=True)])
        with self._at_work():
            trained, what = None if model == ORACLE else reward(self.run, model).path, f"rewards of {model}"
            stage = "oracle" if trained is None else "reward"
            limits = sized_for(self.run, stage)
            judge = open_oracle(self.run) if trained is None else open_reward_model(trained, limits)
            if reader(self.run, stage) is None:
                _check_fit(judge, *ids, model)
                return score_rows(judge, *ids, what).numpy()
            asked = asked_of(opened(data(self.run).path / "preferences"))
            return text_rewards(self.run, stage, judge, prompts, completions, asked, what).numpy()

    def evaluate(self) -> Evaluated:
        """Every method of the run against pi_ref on the test prompts, judged by the oracle. Writes results.json,
        results.png and report.html into the run's folder, and tells `report_to`, as `lm.train` does. ValueError where
        nobody can judge."""
        with self._at_work():
            found = results(self.run)
            if ranks.is_first():
                write(self.run, found)
        return Evaluated(found, Path(self.options.output_dir))

    def _prompt_ids(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        if isinstance(prompts, str):
            raise ValueError(f"prompts must be a list of them, got one text: {prompts[:60]!r}")
        own = tokenizer(self.run)
        ids = prompt_ids(own, [self._written(prompt, f"prompts[{i}]") for i, prompt in enumerate(prompts)])
        if [] in ids:
            raise ValueError(f"prompts[{ids.index([])}] is empty; a token or more is needed")
        return ids

    def _written(self, prompt: Prompt, where: str) -> str:
        if isinstance(prompt, str):
            return prompt
        own, model = tokenizer(self.run), self.options.model
        return Names.by(own, self.options.data.control_tokens).prompt(prompt, chat_renderer(own, model), where)

    def _ids(self, prompts: Sequence[Prompt], completions: Sequence[str]) -> tuple[list[list[int]], list[list[int]]]:
        if isinstance(completions, str):
            raise ValueError(f"completions must be a list of them, got one text: {completions[:60]!r}")
        if len(prompts) != len(completions):
            raise ValueError(f"a completion for each prompt is needed, got {len(prompts)} and {len(completions)}")
        return self._prompt_ids(prompts), completion_ids(tokenizer(self.run), list(completions))

    def _view(self) -> Table:
        report = data(self.run).metrics
        view = Table(title=Text(f"{self.options.output_dir}: {self.options.data.path or 'the embedded world'}"))
        for heading in ("rows", *SPLITS, "left out"):
            view.add_column(heading, justify="left" if heading == "rows" else "right")
        for name in SETS:
            kept = report[name]["kept"]
            counts = [*(kept.get(split, 0) for split in SPLITS), sum(report[name]["dropped"].values())]
            view.add_row(name, *(f"{count:,}" for count in counts))
        view.caption = Text("\n".join(line.strip() for name in SETS for line in lines(report[name])))
        return view

    def __repr__(self) -> str:
        return as_printed(self._view())

    def _repr_html_(self) -> str:
        return as_html(self._view())


def _check_fit(
    model: CompletionModel, prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]], name: str
) -> None:
    """ValueError where a prompt and its completion are longer than the model's positions."""
    most = getattr(model.model.config.get_text_config(), "max_position_embeddings", None)
    for i, both in enumerate(zip(prompts, completions, strict=True)):
        prompt, completion = map(len, both)
        if most is not None and prompt + completion > most:
            raise ValueError(
                f"prompts[{i}] has {prompt:,} tokens: with {completion:,} of a completion they must be at most the "
                f"{most:,} positions of {name}"
            )


class Policy:
    """A trained policy.

    Args:
        loaded: the run that it is of.
        name: of its method, or "sft".
        folder: its model, which `transformers` loads.
        history: what its training logged, a mapping each, by `step`.
    """

    def __init__(self, loaded: Loaded, name: str, folder: Path, history: list[dict[str, Any]]) -> None:
        self.loaded, self.name, self.folder, self.history = loaded, name, folder, history

    @cached_property
    def model(self) -> CompletionModel:
        """It, opened where it scores and samples."""
        run = self.loaded.run
        return open_policy(self.folder, tokenizer(run), sized(run))

    def sample(self, prompts: Sequence[Prompt], *, temperature: float | None = None, seed: int = 0) -> list[str]:
        """A completion of each prompt, without its end-of-text, of at most `data.max_completion_length` tokens.

        Args:
            prompts: text or messages.
            temperature: `sampling.temperature` where it is None.
            seed: of the draws; the same one draws the same.

        Raises:
            ValueError: a temperature that is not positive, a negative seed, an empty prompt, or one that with the
                longest completion is longer than the model's positions.
        """
        check_seed(seed, "seed")
        run, ids = self.loaded.run, self.loaded._prompt_ids(prompts)
        config, own = sized(run), tokenizer(run)
        if temperature is not None:
            config = replace(config, sampling=replace(config.sampling, temperature=temperature))
        with self.loaded._at_work():
            _check_fit(self.model, ids, [[0] * config.data.limits[1]] * len(ids), self.name)
            drawn = sample_completions(self.model, ids, own, config, seed=seed, what=f"{self.name} samples")
        return [sample_text(own, *both) for both in zip(ids, drawn, strict=True)]

    def logps(self, prompts: Sequence[Prompt], completions: Sequence[str]) -> npt.NDArray[np.float64]:
        """Summed log-probs of N completions, [N], nats, end-of-text included. ValueError where numbers differ, or
        where a prompt and its completion are longer than the model's positions."""
        ids = self.loaded._ids(prompts, completions)
        with self.loaded._at_work():
            _check_fit(self.model, *ids, self.name)
            return score_rows(self.model, *ids, f"{self.name} log-probs").numpy()

    def __repr__(self) -> str:
        return f"{self.name}: {self.folder}"


class Evaluated:
    """The results of a run. Prints and shows its tables, and its cautions; a notebook has the picture too.

    Args:
        results: the record, as results.json has it.
        folder: of the run.
    """

    def __init__(self, results: Results, folder: Path) -> None:
        self.results, self.folder = results, folder

    @property
    def methods(self) -> dict[str, MethodResult]:
        """What was measured of each method: `advantage` over pi_ref (oracle reward), its `ci`, `length`, `kl`, ..."""
        return dict(self.results.methods)

    @property
    def sft(self) -> PolicyResult:
        """What was measured of pi_ref."""
        return self.results.sft

    @property
    def cautions(self) -> list[Caution]:
        """What to know before a number is believed: `about` whom, `kind`, `text`, and all of it as one `line`."""
        return cautions(self.results)

    @property
    def page(self) -> Path:
        """report.html: objectives, curves and samples side by side."""
        return self.folder / "report.html"

    def __repr__(self) -> str:
        tables = as_printed(table(self.results), comparisons(self.results))
        return "\n".join((tables, *(f"warning: {one.line}" for one in self.cautions)))

    def _repr_html_(self) -> str:
        with style():
            picture = svg(overview.draw(self.results), "overview", "advantage, length and KL of every method")
        warnings = "".join(f"<li>warning: {html.escape(one.line)}</li>" for one in self.cautions)
        tables = as_html(table(self.results)), as_html(comparisons(self.results))
        return "".join((*tables, f"<ul>{warnings}</ul>" if warnings else "", str(picture)))


# ---------------------------------------------------------------- tables


def as_printed(*tables: Table) -> str:
    """Tables as text."""
    printed = io.StringIO()
    Console(file=printed, width=120, force_jupyter=False, force_terminal=False).print(*tables)
    return printed.getvalue().rstrip("\n")


def as_html(view: Table) -> str:
    """A table as HTML, whatever its cells hold: what stands in them is text."""

    def plain(cell: Any) -> str:
        return html.escape(cell.plain if isinstance(cell, Text) else Text.from_markup(str(cell)).plain)

    rows = zip(*(column.cells for column in view.columns), strict=True)
    head = "".join(f'<th scope="col">{plain(column.header)}</th>' for column in view.columns)
    body = "".join("<tr>" + "".join(f"<td>{plain(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    caption = f"<caption>{plain(view.title)}</caption>" if view.title else ""
    notes = f"<p>{plain(view.caption)}</p>" if view.caption else ""
    return f"<table>{caption}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>{notes}"
