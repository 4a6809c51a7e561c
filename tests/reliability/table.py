"""`make reliability`: tries what a run must survive, and prints a table with what was measured."""

import os
import sys
import time
from collections import defaultdict
from pathlib import Path

import pytest

RUNS = "training/test_resume.py::"
LAYOUT = "training/test_parallel.py::"
TABLE: dict[int, tuple[str, tuple[str, ...]]] = {
    1: ("killed at random, 30 times", (f"{RUNS}test_random_kills_leave_no_trace",)),
    2: (
        "killed at every write of a save",
        (f"{LAYOUT}test_saving_cut_off_anywhere_leaves_the_old_step_or_the_new",),
    ),
    3: (
        "torn, altered or missing files",
        (
            "test_manifest.py",
            f"{LAYOUT}test_a_torn_checkpoint_is_refused_by_file_and_the_newest_whole_one_offered",
            f"{LAYOUT}test_last_goes_on_from_the_newest_whole_one_and_says_so",
            "test_cli.py::test_an_altered_chunk_is_refused_by_file",
            "test_contents.py",
            "test_result_cache.py",
        ),
    ),
    4: (
        "order of samples, on any layout",
        (
            "data/test_pretraining.py::"
            "test_500_steps_are_one_sequence_on_1_2_4_processes_with_0_1_2_workers",
            f"{RUNS}test_other_layout_goes_on_with_the_same_samples_and_losses",
            "training/test_context_parallel.py::test_a_run_goes_on_with_other_sizes",
        ),
    ),
    5: (
        "no batch lost on resume",
        (
            "reliability/test_long_runs.py::test_the_sampler_has_the_length_of_the_whole_run",
            f"{RUNS}test_same_layout_goes_on_equal_in_every_digit",
        ),
    ),
    6: (
        "every token counted",
        (
            "data/test_prepare.py::test_a_thousand_documents_are_stored_and_counted_exactly",
            "data/test_packing.py",
        ),
    ),
    7: ("stopped by a signal", ("reliability/test_preemption.py",)),
    8: (
        "a run repeats bit for bit",
        ("reliability/test_long_runs.py::test_a_run_repeats_in_every_bit",),
    ),
    9: (
        "micro-batches of 1, 2, 8; no target at all",
        (
            "training/test_module.py::test_gradients_are_those_of_the_joint_batch",
            "training/test_module.py::"
            "test_a_step_without_any_weight_changes_no_gradient_and_is_no_nan",
        ),
    ),
    10: (
        "FSDP2 on two processes is one process",
        (
            f"{LAYOUT}test_two_processes_train_as_one",
            f"{LAYOUT}test_two_processes_end_with_the_weights_of_one",
        ),
    ),
    11: (
        "context parallelism is none; documents stay apart",
        (
            "training/test_context_parallel.py::test_two_processes_share_every_kind_of_row",
            "training/test_context_parallel.py::test_more_processes_share_rows_as_one_would_have_them",
        ),
    ),
    12: (
        "a document sees itself alone",
        (
            "test_model.py::test_a_changed_token_moves_only_later_places_of_its_own_document",
            "test_attention.py::test_packed_rows",
        ),
    ),
    13: (
        "position schemes as published",
        ("position", "test_hugging_face.py::test_an_extended_model_is_the_same_in_transformers"),
    ),
    14: (
        "NaN in loss, gradient, one process",
        (
            f"{LAYOUT}test_a_blow_up_on_one_process_stops_both_before_the_update",
            "training/test_module.py::test_what_is_not_finite_stops_the_run_before_the_update",
        ),
    ),
    15: (
        "a stranger's checkpoint",
        (
            "test_trust.py",
            "test_checkpoint.py::test_torn_and_missing_files_are_named",
            "test_checkpoint.py::test_an_index_cannot_lead_out_of_its_folder",
        ),
    ),
    16: ("a hostile config", ("reliability/test_configs_of_strangers.py",)),
    17: ("malformed documents", ("data/test_malformed.py",)),
    18: (
        "disk full; temporaries of the dead",
        ("reliability/test_disk.py", "test_temporaries.py"),
    ),
    19: ("a process raises, sleeps or dies", ("reliability/test_watchdog.py",)),
    20: (
        "a config comes back as it was",
        (
            "test_cli.py::test_printed_config_fed_back_prints_itself",
            "test_cli.py::test_a_run_repeats_from_the_config_it_left",
        ),
    ),
    21: (
        "memory and open files over 2,000 steps",
        ("reliability/test_long_runs.py::test_memory_and_open_files_stay",),
    ),
    22: (
        "import and doctor without CUDA, flash-attn, transformers",
        (
            "test_cli.py::test_help_is_quick_as_it_imports_nothing_of_others",
            "test_cli.py::test_doctor_tells_versions_and_kernels",
        ),
    ),
    23: (
        "saved while training goes on: killed, signalled, disk full",
        ("reliability/test_async_save.py", "training/test_background.py"),
    ),
    24: (
        "context parallelism: killed, on any layout",
        ("reliability/test_context_parallel_runs.py",),
    ),
}
"""Number, as in docs/reliability.md → what is tried, and the tests that try it, below tests/."""
TESTS = Path(__file__).parents[1]


class Results:
    """Collects what came of each test."""

    def __init__(self) -> None:
        self.outcomes: dict[str, set[str]] = defaultdict(set)
        self.figures: dict[str, list[str]] = {}
        self.seconds: dict[str, float] = defaultdict(float)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        name = report.nodeid.removeprefix("tests/")
        self.outcomes[name].add(report.outcome)
        self.seconds[name] += report.duration
        found = [str(text) for key, text in report.user_properties if key == "figure"]
        if found:
            self.figures[name] = found

    def of(self, number: int) -> list[str]:
        """Return the tests of a row that were run."""
        _, wanted = TABLE[number]
        return [
            name
            for name in self.outcomes
            if any(
                name.partition("[")[0] == each or name.startswith((f"{each}::", f"{each}/"))
                for each in wanted
            )
        ]

    def row(self, number: int) -> str:
        """Return a row of the table."""
        what, names = TABLE[number][0], self.of(number)
        failed = sum("failed" in self.outcomes[name] for name in names)
        skipped = sum("skipped" in self.outcomes[name] for name in names)
        held = f"{len(names) - failed - skipped} of {len(names)}"
        held += f" ({skipped} skipped)" if skipped else ""
        figures = "; ".join(text for name in names for text in self.figures.get(name, []))
        seconds = sum(self.seconds[name] for name in names)
        return f"| {number} | {what} | {held} | {figures} | {seconds:.0f} |"

    def table(self) -> str:
        """Return the whole as Markdown."""
        head = ["| # | what | tests that hold | measured | s |", "|---|---|---|---|---|"]
        return "\n".join([*head, *(self.row(number) for number in TABLE)])


def main(options: list[str]) -> int:
    """Run what the table names; `options` are pytest's."""
    named = [f"{TESTS}/{each}" for _, wanted in TABLE.values() for each in wanted]
    os.environ["THOROUGH"] = "1"
    results, begun = Results(), time.monotonic()
    given = ["-m", "not gpu", "--timeout", "1200", *options, *dict.fromkeys(named)]
    code = int(pytest.main(given, plugins=[results]))
    print(f"\n{results.table()}\n\n{(time.monotonic() - begun) / 60:.1f} minutes", flush=True)
    return code or int(not all(map(results.of, TABLE)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
