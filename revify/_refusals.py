"""What is not converted, and why: the one table of reasons. The documentation's table is checked against it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Reason:
    """Attributes:
    code: a short stable word, which is also the anchor in the documentation (refusals.md).
    when: "never" (it cannot be), "not yet" (it could be) or "do this" (the remedy is in the user's hands).
    message: what was found and what to do; a template.
    """

    code: str
    when: str
    message: str


# fmt: off
REASONS = {reason.code: reason for reason in (
    Reason("post-norm", "do this",
        "a norm with parameters follows the addition, on the path that the next skip reads (post-norm), so two streams "
        "cannot be carried past it. Use a scheme that takes the block as a whole (coupling=revify.BDIA()), or the "
        "pre-norm form of the block (norm_first=True)."),
    Reason("scaled-skip", "not yet",
        "the skip is scaled by {factor}: only a skip that is the identity or a projection can be inverted. "
        "Move the scale into the branch."),
    Reason("ambiguous", "do this",
        "{found}. Nothing to do if this addition is no residual connection."),
    Reason("entangled", "not yet",
        "its branch and that of another addition need values of one another, so neither can be evaluated on its own. "
        "Compute what both need outside of the residual blocks."),
    Reason("escapes", "do this",
        "the value {name} of the projection is also read by {reader}, so the projection cannot be evaluated on its "
        "own. Compute that value outside of the residual block."),
    Reason("in-place", "do this",
        "{found} overwrites the unit's input, which the skip, or the other stream, reads too. Use the out-of-place "
        "form (inplace=False)."),
    Reason("untraceable", "do this",
        "its forward cannot be traced: {error}. Give example_inputs where it asks for shapes; where control flow "
        "depends on the values of tensors, move it into a submodule of its own."),
    Reason("assigns", "do this",
        "its forward changes {name}, which would hold no value of the reversible pass, so it is left as it is. Return "
        "the value instead, or compute it outside of the residual block."),
    Reason("draws", "do this",
        "its forward draws from Python's or NumPy's random numbers, which a second evaluation cannot repeat, so it is "
        "left as it is. Draw outside of the block, or with torch.rand."),
    Reason("asks", "do this",
        "its forward asks whether gradients, or autocast, are on, which may be another answer at every call, so it is "
        "left as it is. Ask outside of the block."),
    Reason("outside", "do this",
        "its forward uses a tensor that requires grad and is no parameter of it, so its gradient would be lost. "
        "Register the tensor as a parameter, or hand it to forward as an argument."),
    Reason("callable", "not yet",
        "it calls a function that it is given as an argument, whose parameters nobody lists: they would get no "
        "gradient. Make what the function computes a submodule of the block."),
    Reason("instance-forward", "do this",
        "its forward is set on the instance (by accelerate's prepare or a patch, for instance), and would go past the "
        "converted one. Convert the model first, and prepare it then."),
    Reason("shape", "never",
        "the branch returned {found} for a stream of shape {shape}. A reversible update needs both alike: make the "
        "shapes match, or give convert the example_inputs, so that it leaves this addition alone."),
    Reason("saves-nothing", "never",
        "a chain of so little keeps more (two streams) than plain autograd does, so it is left as it is. "
        "Nothing to do."),
    Reason("no-additions", "never",
        "there is no residual addition z + f(z) in it, and nothing else can be inverted. Use a residual network, or "
        "activation checkpointing for this one."),
    Reason("not-widenable", "do this",
        'the ends of this chain cannot be widened: {found}. Use entry="duplicate" and exit="mean", which need no wider '
        "layers."),
)}
# fmt: on


@dataclass(frozen=True)
class Refusal:
    """Something that was not converted.

    Attributes:
        where: the dotted path of the module in which the addition happens, and the addition's name in the graph.
        code: a short stable word, one of those in the documentation's table.
        message: what was found, with the remedy.
    """

    where: str
    code: str
    message: str

    def __str__(self) -> str:
        return f"{self.where}: {self.message} [{self.code}]"


def reason(code: str, **found: object) -> str:
    """The message of a refusal, with what was found."""
    return REASONS[code].message.format(**found)
