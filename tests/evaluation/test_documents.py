"""Text as people have it: encodings, rows of all kinds, compression, odd names."""

import bz2
import gzip
import json
import lzma
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from datasets import Dataset, DatasetDict
from pyarrow import parquet

from absorb_plugin.evaluation import documents
from absorb_plugin.evaluation.documents import read_dataset, read_text

CHAT = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


def write_jsonl(path: Path, records: list[object]) -> Path:
    path.write_text("\n".join(json.dumps(record) for record in records) + "\n")
    return path


def test_plain_text_is_one_document(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("one\n\ntwo\u2028three\n")
    assert list(read_text(path)) == ["one\n\ntwo\u2028three\n"]


def test_json_lines_are_documents(tmp_path):
    path = write_jsonl(
        tmp_path / "a.jsonl", [{"text": "one\ntwo", "id": 1}, {"text": "a\u2028b"}]
    )
    path.write_text(path.read_text() + '\n{"text": "  "}\n')
    assert list(read_text(path)) == ["one\ntwo", "a\u2028b"]


def test_compressed_json_lines(tmp_path):
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"text": "one"}\n{"text": "two"}\n'))
    assert list(read_text(path)) == ["one", "two"]


def test_dataset_by_name(tmp_path):
    write_jsonl(tmp_path / "train.jsonl", [{"text": "one"}, {"text": "two"}])
    assert list(read_dataset(str(tmp_path))) == ["one", "two"]


def test_dataset_without_text_names_its_columns(tmp_path):
    write_jsonl(tmp_path / "train.jsonl", [{"body": "one", "id": 1}])
    with pytest.raises(
        ValueError, match=r"no field `text` or `messages`; the fields are: body, id"
    ):
        read_dataset(str(tmp_path))


def test_unknown_split(tmp_path):
    write_jsonl(tmp_path / "train.jsonl", [{"text": "one"}])
    with pytest.raises(ValueError, match="cannot load dataset .*split 'dev'"):
        read_dataset(str(tmp_path), "dev")


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"a\.txt: no such text file"):
        read_text(tmp_path / "a.txt")


def test_directory(tmp_path):
    with pytest.raises(ValueError, match="is not a file"):
        read_text(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "is empty"),
        ("a.txt", b" \n\n ", "holds no text"),
        ("a.txt", b"caf\xe9 au lait", "as UTF-8 text"),
        ("a.jsonl", b'{"text": ""}\n', "holds no text"),
        (
            "a.jsonl",
            b'{"text": "a"}\n{"body": "b", "id": 1}\n',
            "line 2: no field `text` or `messages`; the fields are: body, id",
        ),
        ("a.jsonl", b'\n\n{"body": "b"}\n', "line 3: no field `text`"),
        ("a.jsonl", b'{"text": "a"}\n{"text": \n', "line 2: not JSON"),
        ("a.jsonl", b'["text"]\n', "line 1: not a JSON object"),
        ("a.jsonl", b'{"text": 3}\n', "line 1: field `text` is not a string"),
    ],
)
def test_unusable_file(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        list(read_text(path))


# --- encodings --------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.json", "a.csv"])
def test_a_byte_order_mark_is_no_text(tmp_path: Path, name: str) -> None:
    content = {"a.txt": "one", "a.json": '[{"text": "one"}]', "a.csv": "text\none\n"}
    path = tmp_path / name
    path.write_text(content.get(name, '{"text": "one"}'), encoding="utf-8-sig")
    assert list(read_text(path)) == ["one"]


def test_line_ends_of_windows(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"one\r\n\r\ntwo\r\n")
    assert list(read_text(tmp_path / "a.txt")) == ["one\n\ntwo\n"]
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "one"}\r\n\r\n{"text": "two"}\r\n')
    assert list(read_text(tmp_path / "a.jsonl")) == ["one", "two"]
    (tmp_path / "a.csv").write_bytes(b'text,id\r\n"one\r\nmore",1\r\ntwo,2\r\n')
    assert list(read_text(tmp_path / "a.csv")) == ["one\r\nmore", "two"]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32"])
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.csv"])
def test_other_unicode_is_named(tmp_path: Path, encoding: str, name: str) -> None:
    path = tmp_path / name
    path.write_text('{"text": "one"}', encoding=encoding)
    with pytest.raises(ValueError, match=f"is {encoding.upper()} text.*iconv -f"):
        read_text(path)


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one", encoding="utf-16-le")
    with pytest.raises(ValueError, match="NUL bytes"):
        read_text(tmp_path / "a.txt")
    (tmp_path / "a.txt").write_bytes(b"a" * 5000 + b"\xe9")
    with pytest.raises(ValueError, match="as UTF-8 text: .*iconv"):
        list(read_text(tmp_path / "a.txt"))


def test_a_pointer_of_git_lfs(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(ValueError, match="a.jsonl is a pointer of Git LFS.*lfs pull"):
        read_text(tmp_path / "a.jsonl")


# --- rows -------------------------------------------------------------------------

TEXTS = ["one, two", "", "three"]
ROWS = [{"text": text, "id": k} for k, text in enumerate(TEXTS)]


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    """In the format that the name says."""
    if path.suffix == ".parquet":
        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif path.suffix in (".csv", ".tsv"):
        separator = "," if path.suffix == ".csv" else "\t"
        lines = [separator.join(rows[0])]
        lines += [separator.join(f'"{x}"' for x in row.values()) for row in rows]
        path.write_text("\n".join(lines) + "\n")
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=1))
    else:
        write_jsonl(path, rows)
    return path


FORMATS = ["a.jsonl", "a.json", "a.csv", "a.tsv", "a.parquet"]


@pytest.mark.parametrize("name", FORMATS)
def test_rows_of_every_format(tmp_path: Path, name: str) -> None:
    path = write_rows(tmp_path / name, ROWS)
    assert list(read_text(path)) == ["one, two", "three"]
    renamed = [{"id": 1, "body": row["text"]} for row in ROWS]
    other = write_rows(tmp_path / f"b{path.suffix}", renamed)
    assert list(read_text(other, "body")) == ["one, two", "three"]
    told = r"no field `text` or `messages`; the fields are: id, body.*text_column"
    with pytest.raises(ValueError, match=told):
        read_text(other)
    with pytest.raises(ValueError, match="no field `bodi`; the fields are: id, body"):
        read_text(other, "bodi")


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.parquet"])
def test_chats_of_every_format(tmp_path: Path, name: str) -> None:
    path = write_rows(tmp_path / name, [{"messages": CHAT}, {"messages": CHAT[:1]}])
    assert list(read_text(path)) == [CHAT, CHAT[:1]]
    named = write_rows(tmp_path / f"b{path.suffix}", [{"turns": CHAT}])
    assert list(read_text(named, "turns")) == [CHAT]


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_chats_in_parts(tmp_path: Path, name: str) -> None:
    parts = [{"type": "text", "text": one} for one in ("Hello ", "there")]
    turn = {"role": "user", "content": parts}
    path = write_rows(tmp_path / name, [{"messages": [turn]}])
    assert list(read_text(path)) == [[{"role": "user", "content": "Hello there"}]]
    seen = {"role": "user", "content": [{"type": "image", "url": "x"}, *parts[:1]]}
    path = write_rows(tmp_path / f"b{path.suffix}", [{"messages": [turn, seen]}])
    with pytest.raises(ValueError, match="messages`: the content .* no text"):
        list(read_text(path))


def test_a_turn_that_calls_tools_has_no_text(tmp_path: Path) -> None:
    turns = [CHAT[0], {"role": "assistant", "content": None, "tool_calls": [{}]}]
    path = write_jsonl(tmp_path / "a.jsonl", [{"messages": turns}])
    ((first, second),) = read_text(path)
    assert first == CHAT[0] and second["content"] == ""


@pytest.mark.parametrize("content", [7, {"text": "x"}, True])
def test_content_that_is_no_text(content: object, tmp_path: Path) -> None:
    turns = [CHAT[0], {"role": "user", "content": content}]
    path = write_jsonl(tmp_path / "a.jsonl", [{"messages": turns}])
    with pytest.raises(ValueError, match="messages`: the content of a turn is"):
        list(read_text(path))


def test_chats_that_are_none(tmp_path: Path) -> None:
    path = write_jsonl(
        tmp_path / "a.jsonl", [{"messages": [{"from": "x", "value": 1}]}]
    )
    with pytest.raises(ValueError, match="line 1: .*`role` and `content`"):
        read_text(path)


def test_an_array_of_strings(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps(["one", " ", "two"]))
    assert list(read_text(path)) == ["one", "two"]
    path.write_text('[{"text": "one"}, 3]')
    with pytest.raises(ValueError, match="row 2: not a JSON object"):
        list(read_text(path))
    path.write_text('[{"text": "one"},')
    with pytest.raises(ValueError, match="a.json: not JSON"):
        read_text(path)
    path.write_text('["one"]')
    with pytest.raises(ValueError, match="row 1 is a string.*: leave text_column out"):
        list(read_text(path, "text"))


def test_tables_with_other_delimiters_and_long_fields(tmp_path: Path) -> None:
    long = "word " * 50_000  # longer than the csv module takes unasked
    (tmp_path / "a.csv").write_text(f'id;text\n1;"one; ""two"""\n2;{long}\n3\n')
    assert list(read_text(tmp_path / "a.csv")) == ['one; "two"', long]


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.tsv", 'text\none, two\nshe said "yes"\n', ["one, two", 'she said "yes"']),
        # as pandas writes it: quotes only where they are needed
        ("a.tsv", 'text\n"one\ntwo, ""so""."\nthree\n', ['one\ntwo, "so".', "three"]),
        ("a.tsv", '"id"\t"text"\n1\t"one\n\ttwo"\n', ["one\n\ttwo"]),
        ("a.csv", "id,text,\n1,one,,\n", ["one"]),
        ("a.csv", 'text\n"one, two"\nlate; she left\n', ["one, two", "late; she left"]),
        ("a.csv", "text\tid\nOne, two\t1\n", ["One, two"]),
        ("a.csv", "id,id,text\n1,2,one\n", ["one"]),
        ("a.csv", '"text","a\nb"\none,1\n', ["one"]),
    ],
)
def test_commas_and_quotes_in_a_text(
    tmp_path: Path, name: str, content: str, expected: list[str]
) -> None:
    (tmp_path / name).write_text(content)
    assert list(read_text(tmp_path / name)) == expected


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "text\nHello, world\n", "row 1 has 2 fields.* header 1. Put quotes"),
        ("a.csv", "id;text\n1;a\n2;b;c\n", "row 2 has 3 fields.* a ';' in it"),
        ("a.tsv", "id\ttext\n1\ta\tb\n", "row 1 has 3 fields.*Put quotes"),
        ("a.csv", 'text\n"not closed\nnext\n', r"line \d: .*quotes are letters"),
        ("a.csv", 'text\none\n"two" \n', r"line 3: .*if only a blank"),
        ("a.csv", 'text\n"not closed\nbut "here"\n', r"line \d: .*are letters"),
        ("a.tsv", 'text\none\n"yes", he said\n', r"line \d: .*quotes are letters"),
        ("a.tsv", 'text\n"not closed\nnext\n', r"line \d: .*quotes are letters"),
        ("a.tsv", 'text\n"not closed\nbut "here" it is\n', r"line \d: .*are letters"),
    ],
)
def test_a_text_is_not_cut(
    tmp_path: Path, name: str, content: str, message: str
) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=f"{name}, {message}"):
        list(read_text(tmp_path / name))


@pytest.mark.parametrize(
    ("name", "content", "where"),
    [
        (
            "a.jsonl",
            '{"text": "one"}\n{"text": "two \\ud83d."}',
            "line 2: field `text`",
        ),
        ("a.json", '["one", "two \\ud83d."]', "row 2"),
        (
            "a.jsonl",
            '{"messages": [{"role": "user", "content": [{"text": "two \\ud83d"}]}]}',
            "line 1: field `messages`",
        ),
    ],
)
def test_half_a_letter(tmp_path: Path, name: str, content: str, where: str) -> None:
    (tmp_path / name).write_text(content)
    told = rf"{name}, {where}: '\\ud83d' at character 5 is half of a letter"
    with pytest.raises(ValueError, match=told):
        list(read_text(tmp_path / name))


@pytest.mark.parametrize(
    ("name", "where"), [("a.jsonl", "a.jsonl, line 1"), ("a.json", "a.json")]
)
def test_deeply_nested(tmp_path: Path, name: str, where: str) -> None:
    (tmp_path / name).write_text("[" * 200_000)
    with pytest.raises(ValueError, match=f"{where}: JSON that is nested too deeply"):
        list(read_text(tmp_path / name))


def test_both_halves_are_a_letter(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "\\ud83d\\ude00"}')
    assert list(read_text(tmp_path / "a.jsonl")) == ["\U0001f600"]


def test_null_is_an_empty_row(tmp_path: Path) -> None:
    rows = [{"text": None}, {"text": "one"}]
    assert list(read_text(write_rows(tmp_path / "a.jsonl", rows))) == ["one"]
    assert list(read_text(write_rows(tmp_path / "a.parquet", rows))) == ["one"]


def test_plain_text_has_no_columns(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one")
    with pytest.raises(ValueError, match="plain text and has no column 'body'"):
        read_text(tmp_path / "a.txt", "body")


def test_long_plain_text_comes_in_pieces_that_are_the_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(documents, "PIECE", 50)
    text = "\n\n".join(f"paragraph {k}\nof two lines" for k in range(40)) + "\n"
    (tmp_path / "a.txt").write_text(text)
    pieces = list(read_text(tmp_path / "a.txt"))
    assert len(pieces) > 10
    assert "\n\n".join(pieces) == text
    (tmp_path / "b.txt").write_text("x" * 175)  # nowhere to cut
    assert [len(piece) for piece in read_text(tmp_path / "b.txt")] == [50, 50, 50, 25]
    # no line of its own: between two words
    (tmp_path / "c.txt").write_text(" ".join(["word"] * 60))
    assert all(
        set(piece.split(" ")) == {"word"} for piece in read_text(tmp_path / "c.txt")
    )


# --- names and compression --------------------------------------------------------


@pytest.mark.parametrize("name", ["corpus[1].txt", "a?.txt", "*.txt", "a{b}.txt"])
@pytest.mark.parametrize("folder", [".", "run[2]", "x*"])
def test_a_path_is_no_pattern(tmp_path: Path, folder: str, name: str) -> None:
    (tmp_path / folder).mkdir(exist_ok=True)
    for other in ("corpus1.txt", "ab.txt"):
        (tmp_path / folder / other).write_text("another file")
    path = tmp_path / folder / name
    path.write_text("asked for")
    assert list(read_text(path)) == ["asked for"]


def write_compressed(path: Path, content: bytes) -> None:
    if path.suffix == ".zst":
        with pyarrow.output_stream(str(path), compression="zstd") as stream:
            stream.write(content)
    else:
        compress = {".gz": gzip, ".bz2": bz2, ".xz": lzma}[path.suffix].compress
        path.write_bytes(compress(content))


@pytest.mark.parametrize("name", ["a.jsonl{}", "a.csv{}", "a.parquet{}", "a.txt{}"])
@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".xz", ".zst"])
def test_compressed_files(tmp_path: Path, name: str, suffix: str) -> None:
    plain = tmp_path / name.format("")
    if plain.suffix == ".txt":
        plain.write_text("one")
    else:
        write_rows(plain, [{"text": "one"}])
    path = tmp_path / name.format(suffix)
    write_compressed(path, plain.read_bytes())
    assert list(read_text(path)) == ["one"]


def test_compression_is_what_the_bytes_say(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(gzip.compress(b'{"text": "one"}'))
    assert list(read_text(tmp_path / "a.jsonl")) == ["one"]
    (tmp_path / "b.jsonl.gz").write_bytes(b'{"text": "one"}')
    assert list(read_text(tmp_path / "b.jsonl.gz")) == ["one"]


@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".xz", ".zst"])
def test_damaged_files(tmp_path: Path, suffix: str) -> None:
    path, cut = tmp_path / f"a.txt{suffix}", tmp_path / f"cut.txt{suffix}"
    write_compressed(path, "\n".join(str(k) for k in range(99_000)).encode())
    whole = path.read_bytes()
    half = len(whole) // 2
    cut.write_bytes(whole[:half])
    path.write_bytes(whole[:half] + bytes(1000) + whole[half + 1000 :])
    # bz2 notices at the end of a block, which is no text then
    for one in (cut,) if suffix == ".bz2" else (path, cut):
        with pytest.raises(ValueError, match=f"{one} is cut short or damaged"):
            list(read_text(one))


def test_a_damaged_table(tmp_path: Path) -> None:
    rows = [{"text": str(number) * 9} for number in range(9000)]
    path = write_rows(tmp_path / "a.parquet", rows)
    whole = path.read_bytes()
    path.write_bytes(whole[:-20])
    with pytest.raises(ValueError, match="a.parquet is cut short or damaged"):
        read_text(path)
    # within the data, which is found when it is read
    path.write_bytes(whole[:4] + b"\xff" * 2000 + whole[2004:])
    with pytest.raises(ValueError, match="a.parquet is cut short or damaged"):
        list(read_text(path))


# --- datasets ---------------------------------------------------------------------


def test_a_dataset_that_was_saved_to_disk(tmp_path: Path) -> None:
    one, two = (Dataset.from_list([{"text": text}]) for text in ("one", "two"))
    one.save_to_disk(tmp_path / "plain")
    assert list(read_dataset(str(tmp_path / "plain"))) == ["one"]
    DatasetDict({"train": one, "test": two}).save_to_disk(tmp_path / "splits")
    assert list(read_dataset(str(tmp_path / "splits"), "test")) == ["two"]
    told = "split 'dev': its splits are train, test. Name another split"
    with pytest.raises(ValueError, match=told):
        read_dataset(str(tmp_path / "splits"), "dev")


def test_columns_of_a_dataset(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "train.jsonl", [{"body": "one"}, {"body": "two"}])
    assert list(read_dataset(str(tmp_path), column="body")) == ["one", "two"]


def test_a_dataset_that_is_a_file(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.parquet", ROWS)
    with pytest.raises(ValueError, match="is a file, not a dataset: give it as text"):
        read_dataset(str(path))


def test_a_directory_that_would_be_a_pattern(tmp_path: Path) -> None:
    """datasets would read another directory, or none."""
    for name, text in (("data[1]", "asked for"), ("data1", "another")):
        (tmp_path / name).mkdir()
        write_jsonl(tmp_path / name / "train.jsonl", [{"text": text}])
    with pytest.raises(ValueError, match="for a pattern.*Rename"):
        read_dataset(str(tmp_path / "data[1]"))


def test_a_stream_without_end_is_read_in_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, logs: list[str]
) -> None:
    write_jsonl(tmp_path / "train.jsonl", [{"text": "four"}] * 9)
    monkeypatch.setattr(documents, "DATASET_CHARACTERS", 10)
    assert list(read_dataset(str(tmp_path))) == ["four"] * 3
    assert "the first 3 documents of dataset" in logs[0]


@pytest.mark.parametrize(
    ("header", "message"),
    [("", "begins with an empty line"), ("text,text", "two columns 'text'")],
)
def test_a_header_that_names_no_column_clearly(
    tmp_path: Path, header: str, message: str
) -> None:
    (tmp_path / "a.csv").write_text(f"{header}\none,two\n")
    with pytest.raises(ValueError, match=message):
        list(read_text(tmp_path / "a.csv"))
