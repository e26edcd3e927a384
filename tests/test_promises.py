"""What documents, docstrings and help texts promise, and which test holds each promise to its word.

A promise that changes must be found here, with a test that still holds it; one that no test can hold is reworded.
"""

from __future__ import annotations

import ast
import functools
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README, RECIPES = "README.md", "dba_kernels/integrations/README.md"
OPTIM, STATE, GRADIENT = "dba_kernels/optim.py", "dba_kernels/saved_state.py", "dba_kernels/global_gradient.py"
COLLECT, COLLECTOR, FILES = "dba_kernels/collect.py", "dba_kernels/collector.py", "dba_kernels/files.py"
TENSOR_FILES, SNAPSHOTS, WEIGHTS = "dba_kernels/tensor_files.py", "dba_kernels/snapshots.py", "dba_kernels/weights.py"
TRAINER, STEPDATA, FORMATS = (
    "dba_kernels/integrations/transformers.py",
    "dba_kernels/stepdata.py",
    "dba_kernels/formats.py",
)
CLI_COLLECT, CLI_FINETUNE = "dba_kernels/cli/collect_command.py", "dba_kernels/cli/finetune_command.py"
CLI_OPTIONS = "dba_kernels/cli/options.py"

PROMISES = [
    # README
    (
        README,
        "loses no update of bf16 weights",
        "test_optim::test_split16_weight_and_remainder_are_the_fp32_trajectory",
    ),
    (README, "Drop-in for `torch.optim.AdamW`", "test_optim::test_follows_adamw_in_fp32"),
    (RECIPES, "leaving out `global_gradient` gives plain AdamW", "test_optim::test_follows_adamw_in_fp64"),
    (README, "weights do not move", "test_collect::test_model_is_left_as_it_was"),
    (
        README,
        "a run that starts from other weights is refused",
        "test_optim::test_missing_and_extra_tensors_are_refused_at_the_first_step",
    ),
    (
        README,
        "checkpoints are interchangeable with `torch.optim.AdamW`'s",
        "test_optim::test_state_dicts_load_both_ways",
    ),
    (
        README,
        "Interrupted runs resume with bit-identical results",
        "test_cli_finetune::test_a_killed_run_resumes_to_the_same_bits",
    ),
    (README, "`split8` 24 of 32 bits", "test_param_formats::test_bf16_exhaustive"),
    (README, "fp16: down to 2⁻¹⁶", "test_param_formats::test_fp16_split16_precision"),
    (README, "1-D and small tensors stay fp32", "test_optim::test_small_and_one_dimensional_tensors_keep_fp32_state"),
    (README, "never waits for the host", "test_no_sync::test_no_format_synchronises"),
    (
        README,
        "FSDP1, DeepSpeed ZeRO, tensor parallelism and CPU offloading of sharded parameters are refused",
        "test_distributed::test_other_layouts_are_refused_by_name",
    ),
    (README, "sparse gradients and `amsgrad` are refused", "test_optim::test_unusable_gradients_name_the_parameter"),
    (
        README,
        "a gradient whose norm over one tensor is 1e18 or more counts as non-finite",
        "test_outside_writes::test_huge_gradient_is_skipped_by_every_backend",
    ),
    # recipes
    (
        RECIPES,
        "a killed run ends with the same bits",
        "test_integrations_resume::test_a_killed_process_resumes_in_a_new_one",
    ),
    (
        RECIPES,
        "asking for clipping in both places is refused",
        "test_integrations_transformers::test_clipping_twice_is_refused",
    ),
    (RECIPES, "They have it all the same", "test_integrations_trainers::test_recipe_for_trainers_without_the_argument"),
    (RECIPES, "loads on any number of ranks", "test_distributed_state::test_saved_state_loads_on_any_number_of_ranks"),
    (
        RECIPES,
        "a rank killed during the save leaves the previous checkpoint alone",
        "test_distributed_state::test_a_rank_killed_while_saving_leaves_the_checkpoint_before",
    ),
    (
        RECIPES,
        "Ranks share one all-reduce of 16 bytes per tensor and step",
        "test_distributed::test_one_small_message_per_step",
    ),
    # the optimizer
    (
        OPTIM,
        "a step with a non-finite gradient is skipped whole, counted, and changes nothing",
        "test_optim::test_non_finite_gradient_skips_the_whole_step",
    ),
    (
        OPTIM,
        "rounding does not depend on the number of ranks",
        "test_distributed_state::test_given_gradients_give_the_same_bits_on_any_number_of_ranks",
    ),
    (
        OPTIM,
        "The first step refuses ranks with another global gradient or other settings of it",
        "test_distributed_agreement::test_another_global_gradient_on_one_rank_is_refused_by_all",
    ),
    (
        OPTIM,
        "Weights that somebody writes between steps count",
        "test_outside_writes::test_backends_take_every_written_weight",
    ),
    (
        OPTIM,
        "This call, and nothing in ``step()``, waits for the device",
        "test_no_sync::test_reading_a_value_is_noticed",
    ),
    (OPTIM, "nothing is cast to the parameter's dtype", "test_optim::test_state_round_trips_bit_exactly"),
    (OPTIM, "Nothing was loaded then", "test_saved_state::test_foreign_states_are_refused_whole"),
    (
        OPTIM,
        "every torch optimizer fails before it takes codes for numbers",
        "test_saved_state::test_compressed_state_is_refused_by_torch",
    ),
    (OPTIM, "fp32 moments for ``torch.optim.AdamW``", "test_saved_state::test_exported_state_continues_in_torch"),
    (
        OPTIM,
        "clamped to ``correction_bounds``, and 1 where it is NaN",
        "test_optim_lifecycle::test_a_correction_of_nan_is_one",
    ),
    (OPTIM, "a warning that counts them", "test_optim_lifecycle::test_unbound_parameters_are_counted"),
    (STATE, "as the exact fp32 value that it stands for", "test_saved_state::test_fp32_and_back_is_the_fp32_run"),
    (STATE, "nothing was loaded then", "test_saved_state::test_exported_weights_round_trip"),
    (
        STATE,
        "The state of a bf16 model fits its fp32 copy",
        "test_saved_state::test_state_of_a_half_model_fits_its_fp32_copy",
    ),
    # collection
    (COLLECT, "weights and buffers are left as they are", "test_collect::test_model_is_left_as_it_was"),
    (COLLECT, "the weights changed meanwhile", "test_collect_trust::test_changed_weights_are_noticed"),
    (COLLECT, "the collection goes on from it", "test_collect::test_killed_and_resumed"),
    (
        COLLECTOR,
        "to the same bits as without the interruption",
        "test_collect_trust::test_finished_collection_is_extended_to_the_same_bits",
    ),
    (
        COLLECTOR,
        "which takes the same batches in the same order, and refuses others",
        "test_collect_trust::test_other_data_are_told_apart",
    ),
    (
        COLLECTOR,
        "where an object shows none of these, a warning says so before the first micro-batch",
        "test_collect_trust::test_data_that_cannot_be_told_apart_are_announced",
    ),
    (COLLECTOR, "dtypes or ``settings`` are refused", "test_collect_trust::test_other_settings_are_refused_on_resume"),
    (
        COLLECTOR,
        "Both are counted, stored and, at the end, warned about",
        "test_collect::test_non_finite_losses_and_gradients_are_dropped",
    ),
    (
        COLLECTOR,
        "the result is the mean per token over all ranks' data",
        "test_distributed_collect::test_sharded_models_give_the_token_weighted_mean",
    ),
    (
        COLLECTOR,
        "Refuse, before the long part, what :meth:`finish` would refuse after it",
        "test_collect_trust::test_unwritable_result_is_refused_before_the_first_batch",
    ),
    (
        COLLECTOR,
        "the error's ``global_gradient`` is the result, in memory",
        "test_collect_trust::test_result_survives_a_full_disk",
    ),
    (
        SNAPSHOTS,
        "of the newest two all have one in common",
        "test_distributed_collect::test_killed_and_resumed_gives_the_same_bytes",
    ),
    (
        WEIGHTS,
        "noticed whichever way they are written or replaced",
        "test_collect_trust::test_changed_weights_are_noticed",
    ),
    # files
    (
        FILES,
        "Files that exist whole or not at all, however many processes write them and whenever one is killed",
        "test_global_gradient::test_killed_while_saving",
    ),
    (FILES, "leaves no trace otherwise", "test_global_gradient::test_full_disk_leaves_the_old_file"),
    (
        FILES,
        "Nobody can have planted a file or a link under its name",
        "test_files::test_temporary_names_cannot_be_guessed",
    ),
    (
        FILES,
        "A link at ``path`` is replaced itself; what it points to is not touched",
        "test_files::test_link_at_the_destination_is_replaced",
    ),
    (FILES, "A file that is replaced hands on its mode", "test_files::test_mode_of_a_replaced_file_stays"),
    (
        TENSOR_FILES,
        "of several processes that write to one place the last to finish wins",
        "test_files::test_writers_at_one_place_leave_one_whole_set",
    ),
    (TENSOR_FILES, "reading would kill the process", "test_files::test_file_written_to_while_it_is_open_is_refused"),
    (GRADIENT, "its digest is verified on first access", "test_global_gradient::test_every_flipped_byte_is_refused"),
    (GRADIENT, "only headers are read, tensors when they are asked for", "test_global_gradient::test_loading_is_lazy"),
    (GRADIENT, "whole or not at all", "test_global_gradient::test_failure_after_writing_leaves_the_old_file"),
    (GRADIENT, "equal exactly where what is stored is", "test_global_gradient::test_same_content_same_bytes"),
    # formats, step, Trainer
    (
        FORMATS,
        "a norm of 1e18 or more counts as non-finite, in every backend alike",
        "test_outside_writes::test_collection_leaves_out_what_a_step_would_skip",
    ),
    (STEPDATA, "not 0 to skip the step", "test_optim::test_grad_scaler_unscales_inside_the_step"),
    (
        TRAINER,
        "every trial of a hyper-parameter search trains with its own",
        "test_integrations_transformers::test_a_search_trains_every_trial_with_its_own_arguments",
    ),
    (TRAINER, "Both at once are refused", "test_integrations_transformers::test_clipping_twice_is_refused"),
    (TRAINER, "continues to the same bits", "test_integrations_resume::test_resumed_run_is_the_uninterrupted_one"),
    # command line
    (
        CLI_COLLECT,
        "goes on from there when it is given more --batches",
        "test_cli_collect::test_going_on_gives_the_same_bytes",
    ),
    (CLI_COLLECT, "The same options give the same file", "test_cli_collect::test_going_on_gives_the_same_bytes"),
    (
        CLI_COLLECT,
        "Ctrl-C (or SIGTERM) writes one first, status 130",
        "test_cli_failures::test_a_stopped_collection_goes_on_to_the_same_bytes",
    ),
    (
        CLI_FINETUNE,
        "a damaged one is named, and the one before it used",
        "test_cli_finetune::test_a_flipped_bit_in_a_checkpoint_is_noticed",
    ),
    (
        CLI_FINETUNE,
        "Ctrl-C (or SIGTERM) ends the step and saves, status 130",
        "test_cli_failures::test_a_stopped_run_is_saved_and_goes_on_to_the_same_bits",
    ),
    (
        CLI_FINETUNE,
        "ends with status 1 and keeps its last good checkpoint",
        "test_cli_failures::test_a_loss_that_becomes_nan_stops_the_run",
    ),
    (
        CLI_FINETUNE,
        "run.json settings and outcome; it is there when all else is",
        "test_cli_failures::test_weights_that_become_nan_in_the_last_step_are_noticed",
    ),
    (
        CLI_OPTIONS,
        'with its "tools" where it has any',
        "test_cli_records::test_tools_reach_the_template_or_are_refused",
    ),
    (CLI_OPTIONS, "each of these also as .gz", "test_cli_records::test_files_are_read_by_their_kind"),
    (README, "only the assistant's turns are learned", "test_cli_text::test_only_the_assistant_is_learned"),
    (
        "dba_kernels/cli/__init__.py",
        "130 stopped by a signal, 70 an error of this program",
        "test_cli_failures::test_exceptions_become_messages",
    ),
    (
        "dba_kernels/cli/output.py",
        "if it fails, the old file stays",
        "test_cli::test_a_write_that_fails_leaves_the_old_file",
    ),
    (
        "dba_kernels/cli/output.py",
        "Nobody can have planted a file or a link under the temporary name",
        "test_cli_failures::test_replaced_files_keep_their_mode_and_temporary_names_cannot_be_guessed",
    ),
]
"""(where it stands, its words, the test that holds it)."""


@functools.cache
def words_of(file: str) -> str:
    """A file's text, white space made even and string literals joined."""
    return " ".join((ROOT / file).read_text().split())


@functools.cache
def names_in(module: str) -> frozenset[str]:
    path = ROOT / "tests" / f"{module}.py"
    tree = ast.parse(path.read_text()) if path.exists() else ast.Module([], [])
    return frozenset(node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))


def broken(where: str, words: str, test: str) -> str | None:
    """What is wrong with an entry."""
    module, _, name = test.partition("::")
    if " ".join(words.split()) not in words_of(where):
        return f"{where} does not say any more: {words!r}"
    return None if name in names_in(module) else f"no test {test}, which holds: {words!r}"


@pytest.mark.parametrize(("where", "words", "test"), PROMISES, ids=[words[:50] for _, words, _ in PROMISES])
def test_every_promise_has_its_test(where: str, words: str, test: str) -> None:
    """Protects promises: each stands where the table says, and the test that holds it exists."""
    assert broken(where, words, test) is None


def test_a_lost_promise_is_noticed() -> None:
    """Negative control: other words, and a test that is not there."""
    where, words, test = PROMISES[0]
    assert broken(where, words + " ever", test) and broken(where, words, test + "_x") and broken(where, words, "x::y")
