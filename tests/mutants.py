"""Planted faults in the engine: each is put into a copy of the project, whose tests must then fail.

``python -m tests.mutants [--only REGEX]`` prints which were noticed, and fails where fewer than 95 % are.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import os
import re
import shlex
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch._dynamo
import torchvision

ROOT = Path(__file__).resolve().parents[1]
ENGINE = Path("revify/_engine")
LEAST = 0.95  # of the mutants are to be killed
TIME_LIMIT = 120  # seconds for the tests of one mutant; one that takes longer hangs, which is noticed too
BROKEN = 99  # the status of a run that pytest itself has not ended
PRELOADED = torch._dynamo, torchvision  # which take seconds to import: a fork has them
FORK = multiprocessing.get_context("fork")
STAMPS = itertools.count(1_000_000_000)
NOT_COPIED = shutil.ignore_patterns(".*", "__pycache__", "site", "build", "dist", "demo-output")


@dataclass(frozen=True)
class Mutant:
    """A fault.

    Attributes:
        name: what goes wrong.
        file: of the engine.
        edits: texts, each of which occurs once in the file, with what takes their places.
        tests: those that should notice, as pytest takes them.
    """

    name: str
    file: str
    edits: tuple[tuple[str, str], ...]
    tests: str


def mutant(name: str, file: str, old: str, new: str, tests: str, *more: tuple[str, str]) -> Mutant:
    return Mutant(name, file, ((old, new), *more), tests)


MUTANTS = [
    # Arithmetic
    mutant(
        "the inverse in a graph adds",
        "coupling.py",
        "return r - self._converted(a, grid)\n\n    def couple_into",
        "return r + self._converted(a, grid)\n\n    def couple_into",
        "test_chain.py -k inverse",
    ),
    mutant(
        "the grid is twice as fine",
        "coupling.py",
        "_GROWTH = 2.0**8",
        "_GROWTH = 2.0**7",
        "test_chain.py -k by_hand",
    ),
    mutant(
        "each stream begins on the other's grid",
        "coupling.py",
        "grid_of(x.detach(), x if beside is None else beside.detach().to(self.state))",
        "grid_of(x.detach() if beside is None else beside.detach().to(self.state), x.detach())",
        "test_chain.py -k by_hand",
    ),
    mutant(
        "a stream of zeros takes no grid from the other",
        "coupling.py",
        "power = torch.where(power > 0, power, _power_of_largest(other))",
        "pass",
        "test_chain.py -k by_hand",
    ),
    mutant(
        "a state is held to be on its grid far too long",
        "coupling.py",
        "return grid / 3",
        "return grid * 300",
        "test_verify.py -k outgrows",
    ),
    mutant(
        "rounding to the grid has no derivative",
        "coupling.py",
        "return da, None",
        "return torch.zeros_like(da), None",
        "test_chain.py -k by_hand",
    ),
    mutant(
        "in-place coupling without looking whether the output is free",
        "coupling.py",
        "if _is_free(a, p):",
        "if a.dtype == p.dtype and a.shape == p.shape and a.is_leaf:",
        "test_chain.py -k 'return_their_input or parameter'",
    ),
    mutant(
        "uncoupling in the memory of a state that somebody holds",
        "coupling.py",
        "if is_alone(r):",
        "if True:",
        "test_chain.py -k 'memory or return_their_input'",
    ),
    mutant(
        "a view of what others hold counts as free",
        "coupling.py",
        "        and is_alone(a)\n",
        "",
        "test_chain.py -k 'return_their_input or parameter or memory'",
    ),
    mutant(
        "an output that a branch has kept counts as free",
        "coupling.py",
        "        and sys.getrefcount(a) <= _REFERENCES\n",
        "",
        "test_engine_faults.py -k 'keeps_is_left_alone and none'",
    ),
    mutant(
        "the streams are in half precision",
        "coupling.py",
        "torch.promote_types(self.inside, torch.float32)",
        "self.inside",
        "test_training_loops.py -k another_dtype",
    ),
    # Updates
    mutant(
        "the final state is handed back with its streams swapped",
        "update.py",
        "return dp, dq, p, q\n",
        "return dp, dq, q, p\n",
        "test_chain.py -k by_hand",
    ),
    mutant(
        "strides are not restored",
        "update.py",
        "p = p if 0 in ctx.strides else with_strides(p, ctx.strides)",
        "pass",
        "test_chain.py -k size_one",
    ),
    mutant(
        "the gradients of what branches return besides are dropped",
        "update.py",
        "d_f = vjp(dr, d_sides)",
        "d_f = vjp(dr)",
        "test_local.py -k side_outputs",
    ),
    mutant(
        "a transition is handed the value that it made",
        "update.py",
        "ctx.mark_non_differentiable(r_shadow)",
        "pass",
        "test_memory.py -k transitions",
    ),
    mutant(
        "a transition hands out the tensor that it keeps",
        "update.py",
        "kept_p if torch.is_grad_enabled() else kept_p.detach()",
        "kept_p",
        "test_chain.py -k memory",
    ),
    mutant(
        "a branch that overwrites its input is not noticed",
        "update.py",
        "if version_of(x) != version:",
        "if False:",
        "test_errors.py -k overwrites",
    ),
    mutant(
        "batches of gradients go through branches that draw numbers",
        "update.py",
        "if any(e is not None and e.random for e in (skip, *parts))",
        "if False",
        "test_inputs.py -k batches_of_gradients",
    ),
    mutant(
        "slices are uncoupled in memory that others hold",
        "update.py",
        "not torch.is_grad_enabled() and is_alone(r)",
        "not torch.is_grad_enabled()",
        "test_slices.py -k two_backward",
    ),
    mutant(
        "the state after the last update is held by every update",
        "state.py",
        "            self.tail.state = None\n",
        "            pass\n",
        "test_memory.py -k 'any_depth or depend_on_depth'",
    ),
    mutant(
        "a stream forgets the strides of dimensions of size 1",
        "coupling.py",
        "if x.stride() == p.stride() or torch.compiler.is_compiling():",
        "if True:",
        "test_chain.py -k size_one",
    ),
    mutant(
        "what is scaled in a graph forgets the strides of dimensions of size 1",
        "coupling.py",
        "return _laid_out_as(past, (p - (p - past).detach()) * a), last",
        "return (p - (p - past).detach()) * a, last",
        "test_chain.py -k size_one",
    ),
    mutant(
        "second derivatives of an open chain lose the state's part",
        "update.py",
        "            if torch.is_grad_enabled():  # this state",
        "            if False:  # this state",
        "test_open_chains.py",
    ),
    mutant(
        "the kept end of an open chain is written over",
        "update.py",
        "(x.detach() for x in ctx.tail.state)",
        "ctx.tail.state",
        "test_open_chains.py",
    ),
    mutant(
        "a loss on side outputs alone finds no state",
        "state.py",
        "self.tail.state = self.x[q].detach(), self.x[p].detach()",
        "pass",
        "test_local.py -k 'side_outputs or does_not_depend'",
    ),
    # The second evaluation
    mutant(
        "the leaf check is dropped",
        "replay.py",
        "_check_leaves(f, (y, *sides), (*inputs, *tensors))",
        "pass",
        "test_engine_faults.py -k nobody_registered",
    ),
    mutant(
        "a saved parameter that comes back as another tensor is not known again",
        "replay.py",
        " and not _accumulates(node, known)",
        "",
        "test_training_loops.py -k saved_tensors",
    ),
    mutant(
        "hooks on parameters see the gradient of a replay",
        "replay.py",
        "if w.is_leaf and not w._backward_hooks:",
        "if w.is_leaf:",
        "test_training_loops.py -k tensor_hooks",
    ),
    mutant(
        "what is no tensor among the context is handed on as the branch left it",
        "replay.py",
        "(snapshot(x),)",
        "(x,)",
        "test_training_loops.py -k context",
    ),
    mutant(
        "generator state is not restored",
        "surroundings.py",
        "        for device, value in current:\n            _set_generator(device, value)",
        "        pass",
        "test_training_loops.py -k dropout",
    ),
    mutant(
        "random numbers are drawn anew",
        "evaluation.py",
        "            spared.enter_context(random_state_set(self.random))",
        "            pass",
        "test_training_loops.py -k dropout",
    ),
    mutant(
        "autocast is not restored in the second evaluation",
        "evaluation.py",
        "replaying(), autocast_set(self.autocast),",
        "replaying(),",
        "test_training_loops.py -k test_autocast",
    ),
    mutant(
        "weights that were cached with a graph are found in the second evaluation",
        "evaluation.py",
        "with spared, replaying(), autocast_set(self.autocast), weights_not_shared():",
        "with spared, replaying(), autocast_set(self.autocast):",
        "test_between_passes.py -k parametrized",
    ),
    mutant(
        "weights that were cached without a graph are found by others",
        "surroundings.py",
        "        parametrize._cache = {}",
        "        pass",
        "test_between_passes.py -k parametrized",
    ),
    mutant(
        "a second evaluation does not say that it is one",
        "evaluation.py",
        "with spared, replaying(),",
        "with spared,",
        "test_chain.py -k each_branch",
    ),
    mutant(
        "buffers that a block's own code reads are not kept",
        "evaluation.py",
        "Buffers(self._read if training else {})",
        "Buffers({})",
        "test_engine_faults.py -k 'buffers_that_advance and ReadsAndWrites'",
    ),
    mutant(
        "tensors that a branch assigns carry no gradient",
        "evaluation.py",
        "self._assigned = self._with_gradients(inputs)",
        "self._assigned = []",
        "test_local.py -k auxiliary_loss_assigned_in_forward",
    ),
    mutant(
        "every assigned tensor counts as one with a gradient",
        "evaluation.py",
        'getattr(vars(self._stand_ins[i]).get(n), "requires_grad", False)',
        "True",
        "test_local.py -k 'lazy_caches or auxiliary'",
    ),
    mutant(
        "`first` keeps the buffer itself instead of a copy",
        "buffers.py",
        "self.before[name] = x.clone()",
        "self.before[name] = x",
        "test_engine_faults.py -k 'buffers_that_advance and Drifting'",
    ),
    mutant(
        "a second evaluation writes into the copy of a buffer",
        "buffers.py",
        "return self.before[name].clone()",
        "return self.before[name]",
        "test_engine_faults.py -k 'two_backward and Drifting'",
    ),
    mutant(
        "what is written behind autograd's back is not noticed",
        "buffers.py",
        "same = not has_values(x) or torch.equal(x, self.before[name])",
        "same = True",
        "test_engine_faults.py -k 'buffers_that_advance and Codebook'",
    ),
    mutant(
        "a second evaluation writes into buffers that are in use",
        "buffers.py",
        "return live if live is None or live.nbytes >= LARGE else live.clone()",
        "return live",
        "test_training_loops.py -k sync_batch_norm",
    ),
    mutant(
        "large buffers are copied in every step",
        "buffers.py",
        "x.nbytes < LARGE or _written.get(x) is not False)",
        "True)",
        "test_engine_faults.py -k large_buffers",
    ),
    mutant(
        "a large buffer that is written late is not noticed",
        "buffers.py",
        "if not copied:",
        "if False:",
        "test_engine_faults.py -k later_step",
    ),
    mutant(
        "the training flag is that of the live module",
        "stand_ins.py",
        'state["training"] = self.training',
        'state["training"] = self.module.training',
        "test_between_passes.py -k training_flag",
    ),
    mutant(
        "stand-ins without held attributes",
        "stand_ins.py",
        "state = self.attributes.copy()",
        "state = vars(self.module).copy()",
        "test_between_passes.py -k attribute",
    ),
    mutant(
        "modules of torch are evaluated again as they are now",
        "stand_ins.py",
        "return vars(module) == self.attributes",
        "return True or vars(module)",
        "test_between_passes.py -k 'training_flag or replaced'",
    ),
    mutant(
        "modules of torch are evaluated again with the parameters that they have now",
        "stand_ins.py",
        "if live.get(name) is not tensors[index]:",
        "if False:",
        "test_training_loops.py -k tensor_hooks",
    ),
    mutant(
        "a container of torch is evaluated again with its live children",
        "stand_ins.py",
        "live = live and (child is None or made[id(child)] is child)",
        "pass",
        "test_chain.py -k plain_autograd",
    ),
    mutant(
        "hooks are handed stand-ins",
        "stand_ins.py",
        "_of_live(f, h.module, stand_in)",
        "f",
        "test_between_passes.py -k hooks",
    ),
    mutant(
        "bound methods, and what is held beside children, are those of live modules",
        "stand_ins.py",
        "        _rebind(state, made)",
        "        pass",
        "test_engine_faults.py -k 'buffers_advance_once and Bound'",
    ),
    mutant(
        "lists of layers hold the live ones",
        "stand_ins.py",
        "elif kind in (list, tuple) and any(id(x) in made for x in value):",
        "elif False:",
        "test_engine_faults.py -k 'buffers and ThroughAList'",
    ),
    mutant(
        "batch norms count their statistics twice",
        "stand_ins.py",
        'state["_buffers"] = dict.fromkeys(attributes["_buffers"])',
        "pass",
        "test_chain.py -k plain_autograd",
    ),
    mutant(
        "casts_not_shared is dropped",
        "turn.py",
        "with casts_not_shared() if trains else nullcontext():",
        "with nullcontext():",
        "test_unlikely_pairs.py -k used_twice",
    ),
    mutant(
        "casts are shared inside of an evaluation",
        "surroundings.py",
        "        with casts_not_shared():",
        "        if True:",
        "test_unlikely_pairs.py -k used_twice",
    ),
    mutant(
        "hooks are taken to draw no random numbers",
        "draws.py",
        'if attributes["_forward_hooks"] or attributes["_forward_pre_hooks"] or "forward" in attributes:',
        "if False:",
        "test_between_passes.py -k draw_random",
    ),
    mutant(
        "a block's own code is taken to draw no random numbers",
        "draws.py",
        "return any(map(_source_may_draw, _codes(function)))",
        "return False",
        "test_between_passes.py -k draw_random",
    ),
    # What the first evaluation leaves to the second
    mutant(
        "attention with dropout is put on the tape",
        "kept_outputs.py",
        'return "attention" in op.__name__ and any(type(x) is float and x > 0 for x in args)',
        "return False",
        "test_unlikely_pairs.py -k computed_again",
    ),
    mutant(
        "kept outputs are given to the wrong operation",
        "kept_outputs.py",
        "given = iter(outputs)",
        "given = iter(outputs[::-1])",
        "test_tape.py",
    ),
    mutant(
        "the tape does not look which operation it is given",
        "kept_outputs.py",
        "if op is expected and shapes == _shapes(args):",
        "if True:",
        "test_tape.py",
    ),
    mutant(
        "an output that something has overwritten is kept",
        "kept_outputs.py",
        "if [x._version for x in tensors_of(kept)] != self._versions[i]:",
        "if False:",
        "test_tape.py",
    ),
    mutant(
        "the tape stands still at an operation of which nothing is kept",
        "kept_outputs.py",
        "                self.position += 1\n                if kept is not None:\n",
        "                if kept is not None:\n                    self.position += 1\n",
        "test_tape.py",
    ),
    mutant(
        "attention that is kept lacks the sums that its gradient needs",
        "kept_outputs.py",
        "if kept and op in WITHOUT_SUMS:",
        "if False:",
        "test_devices.py -k attention",
    ),
    mutant(
        "a norm in eval mode is taken for one in training",
        "batch_statistics.py",
        "if not training or not _is_served(x):",
        "if not _is_served(x):",
        "test_statistics.py -k eval_mode",
    ),
    mutant(
        "statistics are given to a batch of another shape",
        "batch_statistics.py",
        "if known is not None and known[0] == args[0].shape:",
        "if known is not None:",
        "test_statistics.py -k another_shape",
    ),
    mutant(
        "a norm that is not served leaves no gap among the statistics",
        "batch_statistics.py",
        "            self.statistics.append(None)\n",
        "",
        "test_statistics.py",
    ),
    mutant(
        "the scale is left out of what statistics normalize",
        "batch_statistics.py",
        "scale = invstd if weight is None else weight * invstd",
        "scale = invstd",
        "test_statistics.py",
    ),
    # Budgets
    mutant(
        "the first updates are stored instead of the last",
        "state.py",
        "inverts = run.inverts(self.index) and",
        "inverts = run.inverts((run.updates or 1) - 1 - self.index) and",
        "test_budget.py -k nearest_the_loss",
        (
            "keep = run.keep[self.index] if",
            "keep = run.keep[(run.updates or 1) - 1 - self.index] if",
        ),
    ),
    mutant(
        "the planner's key without the autocast state",
        "run.py",
        "x[1].dtype, str(autocast_state(x[1].device)))",
        "x[1].dtype)",
        "test_unlikely_pairs.py -k planned_anew",
    ),
    mutant(
        "the budget is overdrawn by outputs",
        "budget.py",
        "if i < inverted and kept + output.bytes <= budget:",
        "if i < inverted:",
        "test_budget.py -k 'first or keeps_to'",
    ),
    mutant(
        "what saves least comes first",
        "budget.py",
        "(-item[1].work / item[1].bytes, -item[0])",
        "(item[1].work / item[1].bytes, -item[0])",
        "test_budget.py -k come_first",
    ),
    mutant(
        "the state where inversion ends costs nothing",
        "budget.py",
        "return sum(ends) + ",
        "return ",
        "test_budget.py -k 'saves_more or keeps_to'",
    ),
    mutant(
        "the bytes of another batch size are those of the first",
        "budget.py",
        "self.plain = plain * size / measured_at",
        "self.plain = plain",
        "test_budget.py -k every_batch_size",
    ),
    mutant(
        "a planner never forgets",
        "budget.py",
        "while len(self._measured) >= _KINDS:",
        "while False:",
        "test_engine_faults.py -k tables",
    ),
    mutant(
        "measuring draws random numbers",
        "meter.py",
        "with torch.no_grad(), random_state_kept(q_in):",
        "with torch.no_grad():",
        "test_budget.py -k no_trace",
    ),
    mutant(
        "keeping an output costs nothing",
        "costs.py",
        "- size - OVERHEAD",
        "",
        "test_budget.py -k costs_more",
    ),
    mutant(
        "stored branches add up the gradients of what they read in another order",
        "turn.py",
        "return x.expand_as(x) if x.requires_grad and torch.is_grad_enabled() else x",
        "return x",
        "test_training_loops.py -k read_their_stream",
    ),
    # The state
    mutant(
        "guards after transitions are left out",
        "state.py",
        "if skip is not None and writes == 2:\n            self.guarded = False",
        "if skip is not None and writes == 2:\n            pass",
        "test_unlikely_pairs.py -k each_run",
    ),
    mutant(
        "the grids of the two streams are swapped",
        "state.py",
        "grid = None if skip is not None else self.grid[p]",
        "grid = None if skip is not None else self.grid[q]",
        "test_chain.py -k by_hand",
    ),
    mutant(
        "after a transition a stream has the grid that it entered with",
        "state.py",
        "self.x[writes], self.grid[writes] = self.run.coupling.enter(self.x[writes])",
        "self.x[writes] = self.run.coupling.enter(self.x[writes])[0]",
        "test_unlikely_pairs.py -k another_size",
    ),
    mutant(
        "a projection of stream 2 is forgotten where the value is merged",
        "state.py",
        "        if self.waiting is not None:\n            y2 =",
        "        if False:\n            y2 =",
        "test_graph.py -k by_hand",
    ),
    mutant(
        "the extent of a state is never looked at between",
        "state.py",
        "elif self.index % _LOOKS == 0:",
        "elif False:",
        "test_verify.py -k outgrows",
    ),
    mutant(
        "the extent of a state is not looked at ahead of a transition",
        "state.py",
        "        if skip is not None:\n            self._note_extent()\n",
        "",
        "test_unlikely_pairs.py -k outgrows",
    ),
    mutant(
        "a copy of a state has forgotten how many updates it has been through",
        "state.py",
        "self.waiting, self.index, self.extent\n",
        "self.waiting, 0, self.extent\n",
        "test_budget.py -k converted_model_with_transitions",
    ),
    mutant(
        "transforms that see into no autograd function are not noticed",
        "at_work.py",
        "functional = torch._C._functorch.peek_interpreter_stack() is not None",
        "functional = False",
        "test_inputs.py -k 'transforms'",
    ),
    mutant(
        "parameters that are made in the first step are not waited for",
        "state.py",
        "run.inverts(self.index) and not is_lazy(skip, f)",
        "run.inverts(self.index)",
        "test_between_passes.py -k made_in_the_first",
    ),
    mutant(
        "under no_grad the reversible pass stays open",
        "state.py",
        "            self.shadow = {}\n            self.x = {i: x.detach()",
        "            self.x = {i: x.detach()",
        "test_local.py -k 'without_gradients or frozen or no_grad'",
    ),
    mutant(
        "a budget of everything does not hold ahead of a chain",
        "run.py",
        "return self.stores_activations or (self.budget is not None and self.budget.fraction() >= 1)",
        "return self.stores_activations",
        "test_budget.py -k converted_model_with_transitions",
    ),
    # Streams
    mutant(
        "the merged value is stale after a write",
        "streams.py",
        "if self._value is not None and version_of(self._value) != self._version:",
        "if False:",
        "test_local.py -k in_place_operations",
    ),
    mutant(
        "a view of the streams does not see what is written into them",
        "streams.py",
        "written = None if self._base is None else self._base.overwritten()",
        "written = None",
        "test_local.py -k beside_a_view",
    ),
    mutant(
        "a shadow is handed to a second taker",
        "streams.py",
        "if not self.seen.taken:",
        "if True:",
        "test_local.py -k 'test_pattern and (taken_twice or called_again)'",
        (
            "self.state.shadow, self.state.tail, self.seen.taken = {}, None, True",
            "self.state.tail, self.seen.taken = None, True",
        ),
    ),
    mutant(
        "a value that was read without gradients is read again with them",
        "streams.py",
        "if self._value is not None and (self._value.requires_grad or not grad or not self.requires_grad):",
        "if self._value is not None:",
        "test_local.py -k 'test_pattern and tapped'",
    ),
    mutant(
        "a state that is read does not end its reversible pass",
        "streams.py",
        "                state.leave()\n",
        "                pass\n",
        "test_budget.py -k converted_model_with_transitions",
    ),
    mutant(
        "a view of the streams is one of stream 1 alone",
        "streams.py",
        "state.x = {i: getattr(x, name)(*args, **kwargs) for i, x in state.x.items()}",
        "state.x = {i: getattr(x, name)(*args, **kwargs) if i == 1 else x for i, x in state.x.items()}",
        "test_local_users.py -k views_between",
    ),
    # The guard
    mutant(
        "the checksum leaves stream 2 out",
        "guard.py",
        "return _hash(x1) + 3 * _hash(x2)",
        "return _hash(x1)",
        "test_verify.py -k one_changed_bit",
    ),
    mutant(
        "the checksum does not tell the streams apart",
        "guard.py",
        "return _hash(x1) + 3 * _hash(x2)",
        "return _hash(x1) + _hash(x2)",
        "test_verify.py -k one_changed_bit",
    ),
    mutant(
        "the checksum leaves the last bits out",
        "guard.py",
        "return mixed.bitwise_xor_(bits).mul_",
        "return mixed.mul_",
        "test_verify.py -k one_changed_bit",
    ),
    mutant(
        "overflow counts as a fault",
        "guard.py",
        "torch.stack([differs & finite & (far | ~outgrown), differs & finite])",
        "torch.stack([differs & (far | ~outgrown), differs])",
        "test_verify.py -k overflow",
    ),
    mutant(
        "rounding of a state that has outgrown its grid counts as a fault",
        "guard.py",
        "differs & finite & (far | ~outgrown)",
        "differs & finite",
        "test_verify.py -k outgrows",
    ),
    mutant(
        "drift is tolerated",
        "guard.py",
        "DRIFT = 1e-3",
        "DRIFT = 1e3",
        "test_verify.py -k seen_by_the_guard",
    ),
    mutant(
        "samples are of stream 2 alone",
        "guard.py",
        "torch.cat([_spread(x1.detach()), _spread(x2.detach())])",
        "_spread(x2.detach())",
        "test_unlikely_pairs.py -k each_run",
    ),
    mutant(
        "verdicts are mistaken for each other",
        "verdicts.py",
        "zip(conditions.tolist(), verdicts, strict=True)",
        "zip(conditions.tolist(), verdicts[::-1], strict=True)",
        "test_verify.py -k 'guard or outgrows'",
    ),
    # Slices
    mutant(
        "slices in forward order in the backward pass",
        "slices.py",
        "for i in reversed(range(len(slices))):",
        "for i in range(len(slices)):",
        "test_slices.py -k apart_goes",
        ("ps.insert(0, uncouple(slices.of(r, i), a))", "ps.append(uncouple(slices.of(r, i), a))"),
        ("found.insert(0, d)", "found.append(d)"),
        ("functools.reduce(_sum, reversed(found), None)", "functools.reduce(_sum, found, None)"),
    ),
    mutant(
        "context is not cut",
        "slices.py",
        "return [self.read(x, number) if cut else x for x, cut in zip(context, self.cut, strict=True)]",
        "return list(context)",
        "test_slices.py -k context",
    ),
    mutant(
        "context is cut where it does not belong to the samples",
        "slices.py",
        "x.ndim > dim + 1 and x.shape[dim] == length for x",
        "x.ndim > dim + 1 for x",
        "test_slices.py -k context",
    ),
    mutant(
        "decisions on the size of a batch are overlooked",
        "slices.py",
        "if all(_run(dim, f, q, context, cut, size, tracks=False) == operations for size in sizes):",
        "if True:",
        "test_slices.py -k mixes",
    ),
    mutant(
        "whether a branch may be cut is asked in one mode alone",
        "slices.py",
        "return given, attributes, torch",
        "return given, torch",
        "test_slices.py -k mode_that_changes",
    ),
    mutant(
        "slices of a sequence are not dense",
        "slices.py",
        "return part.contiguous() if self.dim else part",
        "return part",
        "test_slices.py -k few_samples",
    ),
    mutant(
        "stored slices add up the gradient of what all read in another order",
        "slices.py",
        "x.expand_as(x) if isinstance(x, Tensor) and not cut else x for x, cut in zip(context, slices.cut",
        "x for x, cut in zip(context, slices.cut",
        "test_slices.py -k 'context'",
    ),
    mutant(
        "a mean over the batch counts as apart",
        "apart_rules.py",
        "if not over or d in over:",
        "if not over:",
        "test_slices.py -k mixes",
    ),
    mutant(
        "a roll along the batch counts as apart",
        "apart_rules.py",
        "if not dims or d in {n % args[0].ndim for n in dims}:",
        "if not dims:",
        "test_slices.py -k mixes",
    ),
    mutant(
        "batch statistics count as apart",
        "apart_rules.py",
        'if d in (None, 1) or (args[5] if len(args) > 5 else kwargs.get("training")):',
        "if d in (None, 1):",
        "test_slices.py -k mixes",
    ),
    mutant(
        "a softmax over the batch counts as apart",
        "apart_rules.py",
        'dim = kwargs.get("dim", given[0] if given else -1)\n    if dim % args[0].ndim == d:',
        'dim = kwargs.get("dim", given[0] if given else -1)\n    if dim < -99:',
        "test_slices.py -k mixes",
    ),
    mutant(
        "a part of the batch counts as apart",
        "apart_rules.py",
        "% args[0].ndim == d and result.shape[d] != args[0].shape[d]:",
        "% args[0].ndim == d and False:",
        "test_slices.py -k mixes",
    ),
    mutant(
        "samples are not followed through transpositions",
        "apart_rules.py",
        "return {a: b, b: a}.get(d, d)",
        "return d",
        "test_slices.py -k mixes",
    ),
    mutant(
        "products between samples count as apart",
        "apart_rules.py",
        "    if da is None and db == last:\n        return last\n    raise Mixed",
        "    if da is None and db == last:\n        return last\n    return last - 1",
        "test_slices.py -k mixes",
    ),
    mutant(
        "samples are followed into views that break them up",
        "apart_rules.py",
        "if not rest and outer and result.shape[place] % (outer * t.samples) == 0:",
        "if not rest and outer:",
        "test_slices.py -k mixes",
    ),
    mutant(
        "what differs from sample to sample counts as the same for all",
        "apart.py",
        "return x.shape[dim] == 1 or x.stride(dim) == 0 or id(x) in self._uniform",
        "return True",
        "test_slices.py -k mixes",
    ),
    mutant(
        "an operation without a rule counts as apart",
        "apart.py",
        "        if rule is None:\n            raise Mixed(str(op))",
        "        if rule is None:\n            rule = elementwise",
        "test_slices.py -k mixes",
    ),
    # Chains and regions
    mutant(
        "the inverse changes buffers",
        "chain.py",
        "a = f.again(f.tensors, coupling.read(q), *context)",
        "a = step.branch(coupling.read(q), *context)",
        "test_chain.py -k inverse",
    ),
    mutant(
        "store_activations is not undone",
        "chain.py",
        "settings.stores_activations = value",
        "pass",
        "test_chain.py -k undone",
    ),
    mutant(
        "saved code has lost what cannot be imported",
        "region.py",
        '"names": self.names, "objects": self.objects}',
        '"names": self.names, "objects": {}}',
        "test_graph.py -k infinities",
    ),
    mutant(
        "what a branch returns besides is lost behind an activation",
        "region.py",
        "self.head, self.function = head, function\n        self.sides = sides_of(function)",
        "self.head, self.function = head, function\n        self.sides = 0",
        "test_local.py -k side_outputs",
    ),
]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__)
    parser.add_argument("--only", default="", metavar="REGEX", help="those whose name or file matches")
    only = re.compile(parser.parse_args().only)
    chosen = [m for m in MUTANTS if only.search(m.name) or only.search(m.file)]
    broken = [problem for m in chosen if (problem := check(m))]
    if broken or not chosen:
        print("\n".join(broken) or "no mutant matches", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "project"
        shutil.copytree(ROOT, copy, ignore=NOT_COPIED)
        sound: dict[str, bool] = {}  # whether tests pass without a mutant, by selection
        killed = 0
        for m in chosen:
            begun = time.monotonic()
            if m.tests not in sound:
                sound[m.tests] = run(copy, m.tests) == "survived"
            found = tried(copy, m) if sound[m.tests] else "no verdict: the tests fail without it"
            killed += found == "killed"
            print(f"{found:10}{time.monotonic() - begun:5.0f} s  {m.file:20}  {m.name}", flush=True)
    print(f"{killed} of {len(chosen)} killed: {killed / len(chosen):.1%}")
    return 0 if killed >= LEAST * len(chosen) else 1


def check(m: Mutant) -> str | None:
    """What is wrong with the mutant itself, if anything."""
    source = (ROOT / ENGINE / m.file).read_text()
    for old, _ in m.edits:
        if (count := source.count(old)) != 1:
            return f"{m.name}: {m.file} has this {count} times, not once: {old!r}"
    try:
        compile(edited(source, m), m.file, "exec")
    except SyntaxError as error:
        return f"{m.name}: {error}"
    return None


def edited(source: str, m: Mutant) -> str:
    for old, new in m.edits:
        source = source.replace(old, new)
    return source


def tried(copy: Path, m: Mutant) -> str:
    path = copy / ENGINE / m.file
    source = path.read_text()
    write(path, edited(source, m))
    try:
        return run(copy, m.tests)
    finally:
        write(path, source)


def write(path: Path, source: str) -> None:
    """With a time of its own: byte code of another text, written in the same second, would be taken for this one's."""
    path.write_text(source)
    stamp = next(STAMPS)
    os.utime(path, (stamp, stamp))


def run(copy: Path, tests: str) -> str:
    """``killed``, ``survived``, or what went wrong."""
    process = FORK.Process(target=pytest_in, args=(copy, tests))
    process.start()
    process.join(TIME_LIMIT)
    if process.is_alive():
        process.kill()
        process.join()
        return "killed"
    status = process.exitcode or 0
    if status == 1 or status < 0:  # a test failed, or the process died
        return "killed"
    return f"no verdict: pytest ends with {status}" if status else "survived"


def pytest_in(copy: Path, tests: str) -> None:
    """As ``python -m pytest`` in the folder."""
    os.chdir(copy)
    os.environ["OMP_NUM_THREADS"] = "1"
    for stream in (sys.stdout, sys.stderr):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    sys.path[:] = [str(copy), *(p for p in sys.path if Path(p).resolve() != ROOT)]
    for name in [n for n in sys.modules if n.partition(".")[0] in ("tests", "revify")]:
        del sys.modules[name]
    words = [f"tests/{w}" if w.startswith("test_") and w.endswith(".py") else w for w in shlex.split(tests)]
    status = BROKEN
    try:
        status = int(pytest.main(["-x", "-q", "-p", "no:cacheprovider", *words]))
    finally:
        os._exit(status)


if __name__ == "__main__":
    sys.exit(main())
