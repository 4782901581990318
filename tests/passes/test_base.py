"""Passes are applied on a copy, their contract is checked, and what they say is compared with what they did."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
from torture import TRAPS

from passes import RenameIO, ToFp16
from passes.base import EXACT, Finding, Outcome, Pass, apply
from surgery.errors import ArchitectureError, PassError, SurgeryError
from surgery.graph.model import Model
from surgery.graph.weight_conversion import Conversion

Edit = Callable[[Model], None]


def nothing(_: Model) -> None:
    """Changes nothing."""


def rename_node(model: Model) -> None:
    model.graph.node[0].name += "!"


def break_graph(model: Model) -> None:
    model.graph.node[0].input[0] = "ghost"


def refuse(_: Model) -> None:
    raise PassError("tensor 'x' is INT8; FLOAT is expected", hint="try another")


@dataclass(frozen=True)
class Step(Pass):
    """A pass made of three functions, with the findings that it claims."""

    name: ClassVar[str] = "step"
    summary: ClassVar[str] = "a pass for tests"

    edit: Edit = nothing
    claims: tuple[Finding, ...] = ()
    before: Edit = nothing
    after: Edit = nothing

    def requires(self, model: Model) -> None:
        self.before(model)

    def run(self, model: Model) -> list[Finding]:
        self.edit(model)
        return list(self.claims)

    def ensures(self, model: Model) -> None:
        self.after(model)


CHANGED = (Finding("changed", "node", "it has another name"),)
SKIPPED = (Finding("skipped", "node", "there is nothing to do"),)


@pytest.fixture
def model() -> Model:
    return Model(TRAPS["metadata_at_every_level"](), Path("a.onnx"))


def test_a_pass_changes_a_copy(model: Model) -> None:
    before = model.fingerprint()
    result, (outcome,) = apply(model, [Step(rename_node, CHANGED)])
    assert outcome.changed and outcome.findings == CHANGED and outcome.operators == {}
    assert model.fingerprint() == before != result.fingerprint()


def test_operators_added_and_removed_are_counted(model: Model) -> None:
    def edit(model: Model) -> None:
        model.graph.node[0].op_type = "Abs"

    _, (outcome,) = apply(model, [Step(edit, CHANGED)])
    assert outcome.operators == {"Abs": 1, "Relu": -1}


def test_a_pass_that_claims_a_change_it_did_not_make_is_caught(model: Model) -> None:
    with pytest.raises(PassError, match="step: it reports a change, but the model did not change"):
        apply(model, [Step(nothing, CHANGED)])


@pytest.mark.parametrize("claims", [SKIPPED, ()])
def test_a_pass_that_hides_a_change_is_caught(claims: tuple[Finding, ...], model: Model) -> None:
    with pytest.raises(PassError, match="step: it reports no change, but the model changed"):
        apply(model, [Step(rename_node, claims)])


@pytest.mark.parametrize("where", ["before", "after"])
def test_a_change_outside_of_run_counts_as_a_change(where: str, model: Model) -> None:
    with pytest.raises(PassError, match="it reports no change, but the model changed"):
        apply(model, [Step(**{where: rename_node})])  # type: ignore[arg-type]


def test_a_pass_that_moves_a_weight_file_changed_the_model(model: Model) -> None:
    def edit(model: Model) -> None:
        model.weight_files["w.data"] = Path("elsewhere")

    _, (outcome,) = apply(model, [Step(edit, CHANGED)])
    assert outcome.changed and model.weight_files == {}


def test_a_broken_graph_is_caught_and_named(model: Model) -> None:
    with pytest.raises(
        PassError, match="step: it left a broken graph: Relu node 'relu_h' reads 'ghost', which nothing"
    ):
        apply(model, [Step(break_graph, CHANGED)])


@pytest.mark.parametrize("where", ["before", "edit", "after"])
def test_a_failing_pass_names_itself_and_what_went_before(where: str, model: Model) -> None:
    before = model.fingerprint()
    claims = CHANGED if where == "after" else ()
    with pytest.raises(PassError) as raised:
        apply(model, [Step(rename_node, CHANGED), Step(), Step(**{where: refuse}, claims=claims)])  # type: ignore[arg-type]
    assert str(raised.value) == "step after step, step: tensor 'x' is INT8; FLOAT is expected"
    assert raised.value.hint == "try another"
    assert model.fingerprint() == before


def test_any_error_of_ours_becomes_a_pass_error(model: Model) -> None:
    def edit(model: Model) -> None:
        model.require_architecture()

    with pytest.raises(PassError, match=r"step: a\.onnx: layers and head sizes come from the architecture") as raised:
        apply(model, [Step(edit)])
    assert isinstance(raised.value.__cause__, ArchitectureError) and "--config" in (raised.value.hint or "")


def test_a_defect_of_a_pass_is_not_disguised_and_leaves_the_model(model: Model) -> None:
    def defect(model: Model) -> None:
        rename_node(model)
        raise KeyError("oops")

    before = model.fingerprint()
    with pytest.raises(KeyError):
        apply(model, [Step(defect)])
    assert model.fingerprint() == before


def test_observe_sees_each_outcome_as_it_comes(model: Model) -> None:
    seen: list[Outcome] = []
    with pytest.raises(PassError):
        apply(model, [Step(rename_node, CHANGED), Step(refuse)], seen.append)
    assert [outcome.changed for outcome in seen] == [True]


def test_no_passes_give_an_equal_model(model: Model) -> None:
    result, outcomes = apply(model, [])
    assert outcomes == [] and result is not model and result.fingerprint() == model.fingerprint()


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ([RenameIO], "the class RenameIO is given"),
        (RenameIO(), "a RenameIO is given"),
        ("rename-io", "a str is given"),
        ([Step(), "rename-io"], "a str is given"),
    ],
)
def test_what_is_no_sequence_of_passes_is_refused(given: object, sentence: str, model: Model) -> None:
    with pytest.raises(PassError, match=f"apply takes a sequence of passes; {sentence}") as raised:
        apply(model, given)  # type: ignore[arg-type]
    assert "parse(" in (raised.value.hint or "")


def test_what_is_no_model_is_refused(model: Model) -> None:
    with pytest.raises(PassError, match=r"apply takes a surgery\.graph\.model\.Model; a ModelProto is given") as raised:
        apply(model.proto, [])
    assert "Model.from_proto" in (raised.value.hint or "")


def test_a_pass_that_hides_that_it_rewrites_weights_is_caught(model: Model) -> None:
    def edit(model: Model) -> None:
        model.converted["w"] = Conversion(())

    with pytest.raises(PassError, match="step: it has weights written anew, but does not say so"):
        apply(model, [Step(edit, CHANGED)])


def test_a_pass_says_what_it_does_and_holds_to_equality_where_it_does_not() -> None:
    assert (Step.numerics, Step.rewrites_weights) == (EXACT, False)
    assert ToFp16.numerics.kind == "lossy" and ToFp16.rewrites_weights
    with pytest.raises(TypeError, match="abstract"):
        Pass()  # type: ignore[abstract]


def test_messages_escape_control_characters() -> None:
    assert str(SurgeryError("node '\x1b[31mred\x07'")) == "node '\\x1b[31mred\\x07'"
    assert str(Finding("skipped", "a", "b")) == "skipped a: b"
