"""The report of `prepare`: token ledger, document lengths, and what was skipped."""

from lit_longctx.data.store.data_manifest import Manifest


def ledger_report(made: Manifest) -> str:
    """Token ledger and document lengths as a table."""
    lines = [f"source {made.source}: token ledger"]
    both = "BOS and EOS" if made.tokenizer.add_bos else "EOS"
    for split, ledger in made.splits.items():
        lines.append(
            f"  {split:9} {ledger.tokens:>13,} = {ledger.text_tokens:,} text"
            f" + {ledger.boundary_tokens:,} {both} + {ledger.padding:,} padding"
            f" in {ledger.documents:,} documents, {ledger.chunks} chunks"
        )
        if made.chat:
            lines.append(f"  {'':9} {ledger.answer_tokens:>13,} of them answers")
    train = made.splits["train"].lengths
    total = sum(tokens for *_, tokens in train)
    lines.append("  document length    documents         tokens   share")
    for edge, documents, tokens in train:
        lines.append(f"  ≥ {edge:>9,} tokens {documents:>10,} {tokens:>14,} {tokens / total:>7.1%}")
    if (found := made.filter) and found["quantiles"]:
        lines.append(
            f"  filter kept {found['kept']:,} documents ({found['kept_tokens']:,} tokens), dropped "
            f"{found['dropped']:,} ({found['dropped_tokens']:,}); median score "
            f"{found['quantiles']['0.5']:.3f}"
        )
    if made.round_trip < 1:
        share = 1 - made.round_trip
        lines.append(f"  {share:.0%} of the first texts do not come back exactly from their ids")
    for kind, note in made.notes.items():
        lines.append(f"  {note['count']:,} rows: {kind}, first at {note['first']}")
    for kind, fault in made.broken.items():
        lines.append(f"  skipped {fault['count']:,}: {kind}, first at {fault['first']}")
    return "\n".join(lines)
