"""Counters of what the cache did, and the log lines that tell."""

from __future__ import annotations

import logging

logger = logging.getLogger("streaming_llm")

_EVERY = 512


class StatsMixin:
    """`cache.stats` and the log lines; the layers count on their device, and are asked only when somebody reads."""

    @property
    def stats(self) -> dict[str, int]:
        """Totals over layers, rows and heads since the cache was made or reset.

        `total_compressions` counts compactions of single (layer, row, head)s; the token counts are of tokens after (kept)
        or taken out by (dropped: merged into others or evicted) each of them, `total_sketch_tokens` of sketches after it.
        `total_sketch_promotions` counts sketches whose originals returned, `total_replay_triggers` the heads and
        `total_replay_tokens` the originals of replays, `total_calibrations` fits that placed made tokens,
        `total_budget_adjustments` changes of a head's budget by the controller. Calls of the parts by hand count too.
        With recall, `total_recall_requests` counts the heads that asked the archive in a pass, `total_recalled_tokens` what
        they read from it, `archived_tokens` what is in it now.
        """
        counts = [stack.counts for stack in self.stream.stacks]

        def total(name: str) -> int:
            return sum(int(getattr(count, name)) for count in counts) + self._hand_counts.get(name, 0)

        recall = {}
        if self.config.enable_recall:
            resident = sum(stack.archived_tokens for stack in self.stream.stacks)
            recall = {
                "total_recall_requests": total("asked"),
                "total_recalled_tokens": total("recalled"),
                "archived_tokens": resident,
            }
        return {
            "total_compressions": total("head_compactions"),
            "total_exact_kept": total("kept_exact"),
            "total_compressed_kept": total("kept_compressed"),
            "total_middle_dropped": total("dropped"),
            "total_sketch_tokens": total("kept_sketches"),
            "total_replay_tokens": total("replayed"),
            "total_sketch_promotions": total("promotions"),
            "total_replay_triggers": total("replay_triggers"),
            "total_calibrations": total("calibrations"),
            "total_budget_adjustments": total("adjustments"),
            **recall,
        }

    def _log_every_512(self, seen: int, new: int) -> None:
        """Log a report whenever another 512 tokens have been seen."""
        if seen // _EVERY == (seen - new) // _EVERY or not logger.isEnabledFor(logging.INFO):
            return
        at = seen // _EVERY * _EVERY
        for line in self.report(at):
            logger.info(line)

    def report(self, at: int | None = None) -> list[str]:
        """The log lines as they would be written now, `at` tokens."""
        at = self.current_length if at is None else at
        stats = self.stats
        times = max(1, stats["total_compressions"])
        size, most = self.held_tokens, self.config.expected_max_tokens
        config = self.config
        lines = [
            f"[ADMS Stats @ {at}] Avg per head: exact={stats['total_exact_kept'] / times:.1f}, "
            f"compressed={stats['total_compressed_kept'] / times:.1f}, dropped={stats['total_middle_dropped'] / times:.1f}"
        ]
        if config.enable_dual_fidelity:
            lines.append(
                f"[ADMS Dual-Fidelity @ {at}] Sketches: {stats['total_sketch_tokens']}, "
                f"Promotions: {stats['total_sketch_promotions']}"
            )
        if config.enable_residual_replay:
            lines.append(
                f"[ADMS Replay @ {at}] Triggers: {stats['total_replay_triggers']}, Tokens: {stats['total_replay_tokens']}"
            )
        if config.enable_position_calibration:
            lines.append(f"[ADMS Calibration @ {at}] Total calibrations: {stats['total_calibrations']}")
        if config.enable_adaptive_controller:
            lines.append(f"[ADMS Controller @ {at}] Budget adjustments: {stats['total_budget_adjustments']}")
        if config.enable_recall:
            lines.append(
                f"[ADMS Recall @ {at}] Requests: {stats['total_recall_requests']}, "
                f"Tokens: {stats['total_recalled_tokens']}, Archived: {stats['archived_tokens']}"
            )
        return [
            *lines,
            f"[ADMS Cache @ {at}] Actual size: {size}, Expected max: {most}, Ratio: {size / max(1, at):.2%}",
        ]


def format_bytes(size: int) -> str:
    """A size with the binary unit that keeps it readable: 45.4 MiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024 or unit == "GiB":
            break
        size /= 1024
    return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
