import pytest
import torch

from lit_longctx.batch import Documents, documents_from_starts, one_document, pack

B, E = 1, 2


def test_the_example_drawn_in_the_docstring():
    batch = pack(torch.tensor([[B, 5, 6, E, B, 7, 8, 9]]), bos=B)
    assert batch.input_ids.tolist() == [[B, 5, 6, E, B, 7, 8]]
    assert batch.labels.tolist() == [[5, 6, E, -100, 7, 8, 9]]
    assert batch.loss_weights.tolist() == [[1, 1, 1, 0, 1, 1, 1]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 0, 1, 2]]
    assert batch.documents.ids.tolist() == [[0, 0, 0, 0, 1, 1, 1]]
    assert batch.documents.boundaries.tolist() == [0, 4, 7]
    assert batch.documents.longest == 4


def test_a_fragment_at_the_beginning_is_a_document_and_rows_never_join():
    batch = pack(torch.tensor([[5, 6, B, 7, 8], [5, 6, 7, 8, 9]]), bos=B)
    assert batch.position_ids.tolist() == [[0, 1, 0, 1], [0, 1, 2, 3]]
    assert batch.documents.boundaries.tolist() == [0, 2, 4, 8]
    assert batch.labels.tolist() == [[6, -100, 7, 8], [6, 7, 8, 9]]


def test_explicit_starts_serve_fragments_without_bos():
    starts = torch.tensor([[True, False, False, True, False, False]])
    batch = pack(torch.tensor([[5, B, 6, 7, 8, 9]]), bos=B, starts=starts)
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 1]]
    assert batch.labels.tolist() == [[B, 6, -100, 8, 9]]


def test_padding_is_a_document_of_its_own_without_targets():
    batch = pack(torch.tensor([[B, 5, E, -1, -1, -1]]), bos=B)
    assert batch.input_ids.tolist() == [[B, 5, E, 0, 0]]
    assert batch.labels.tolist() == [[5, E, -100, -100, -100]]
    assert batch.documents.ids.tolist() == [[0, 0, 0, 1, 1]]


def test_against_a_slow_loop_over_random_windows():
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        windows = torch.randint(-1, 6, (3, 30), generator=generator)
        batch = pack(windows, bos=B)
        offset = 0
        boundaries = []
        for row, window in enumerate(windows.tolist()):
            document = place = -1
            for t in range(29):
                new = t == 0 or window[t] == B or (window[t] < 0) != (window[t - 1] < 0)
                document, place = (document + 1, 0) if new else (document, place + 1)
                boundaries += [offset + t] if new else []
                padding = window[t] < 0 or window[t + 1] < 0
                label = -100 if padding or window[t + 1] == B else window[t + 1]
                assert batch.documents.ids[row, t] == document
                assert batch.position_ids[row, t] == place
                assert batch.labels[row, t] == label
            offset += 29
        assert batch.documents.boundaries.tolist() == [*boundaries, 3 * 29]


def test_lengths_are_those_of_each_tokens_document():
    starts = torch.tensor([[1, 0, 0, 1, 0], [1, 1, 0, 0, 0]], dtype=torch.bool)
    documents = documents_from_starts(starts)
    assert documents.lengths().tolist() == [[3, 3, 3, 2, 2], [1, 4, 4, 4, 4]]
    assert documents.longest == 4


@pytest.mark.parametrize(("rows", "tokens"), [(1, 1), (3, 5)])
def test_one_document_per_row(rows, tokens):
    documents = one_document(rows, tokens)
    starts = torch.zeros(rows, tokens, dtype=torch.bool)
    starts[:, 0] = True
    expected = documents_from_starts(starts)
    assert isinstance(documents, Documents)
    assert documents.boundaries.tolist() == expected.boundaries.tolist()
    assert documents.longest == expected.longest == tokens
