"""Files cut into pieces for a machine that is reached by several small transfers, and joined again there.

    python bench/pku_small/bundle.py .pku-small TARGET    joins the files under TARGET, or says what to send

A bundle has a folder for each transfer, .pku-small/1, .pku-small/2, …. Each holds pieces and the manifest of
the whole bundle, with the SHA-256 of every piece and every file. `write` makes one, `join` reads it.
"""

import hashlib
import json
import shutil
import sys
from pathlib import Path

MANIFEST = "manifest.json"
PIECE_BYTES = 45_000_000
BLOCK = 1 << 22


class BundleError(ValueError):
    """What is wrong with a bundle, in one line that says what to do."""


def sha256(path):
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def cut(files, piece_bytes):
    """Yields (name, number of the piece or None for an uncut file, start, size) of each piece."""
    for name, path in files.items():
        size = path.stat().st_size
        if size <= piece_bytes:
            yield name, None, 0, size
            continue
        for number, start in enumerate(range(0, size, piece_bytes)):
            yield name, number, start, min(piece_bytes, size - start)


def grouped(pieces, group_bytes):
    """Returns lists of pieces, at most `group_bytes` each: the largest first, into the first that fits."""
    groups = []
    for piece in sorted(pieces, key=lambda p: -p[3]):
        size = piece[3]
        if size > group_bytes:
            raise BundleError(f"a transfer: expected room for a piece of {size} bytes, got {group_bytes}")
        group = next((g for g in groups if sum(p[3] for p in g) + size <= group_bytes), None)
        if group is None:
            groups.append([piece])
        else:
            group.append(piece)
    return groups


def copy_part(source, start, size, target):
    """Copies `size` bytes of a file; returns their SHA-256."""
    target.parent.mkdir(parents=True, exist_ok=True)
    digest, remaining = hashlib.sha256(), size
    with open(source, "rb") as stream, open(target, "wb") as out:
        stream.seek(start)
        while block := stream.read(min(BLOCK, remaining)):
            digest.update(block)
            out.write(block)
            remaining -= len(block)
    return digest.hexdigest()


def write(files, folder, group_bytes, facts, piece_bytes=PIECE_BYTES):
    """Writes a bundle; an older one in the folder is replaced once the new one is complete.

    Args:
        files: {name in the bundle, a relative path: Path of the file}.
        folder: The bundle's folder.
        group_bytes: Most bytes of the pieces of one transfer.
        facts: What else the manifest says, e.g. the commit.
        piece_bytes: Most bytes of a piece.

    Returns:
        The manifest.
    """
    groups = grouped(cut(files, min(piece_bytes, group_bytes)), group_bytes)
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    entries = {name: {"size": 0, "sha256": sha256(path), "pieces": []} for name, path in files.items()}
    for count, group in enumerate(groups, 1):
        for name, number, start, size in group:
            path = f"{count}/{name}" if number is None else f"{count}/{name}.{number:03}"
            digest = copy_part(files[name], start, size, partial / path)
            entries[name]["size"] += size
            entries[name]["pieces"].append({"path": path, "start": start, "size": size, "sha256": digest})
    for entry in entries.values():
        entry["pieces"].sort(key=lambda piece: piece["start"])
    manifest = {**facts, "groups": len(groups), "files": entries}
    for count in range(1, len(groups) + 1):
        (partial / str(count) / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
    return manifest


def read_manifest(folder):
    """Returns the manifest, which every transfer has; raises if there is none or if they differ."""
    found = {}
    for path in sorted(Path(folder).glob(f"*/{MANIFEST}")):
        try:
            found[path.parent.name] = json.loads(path.read_text())
            found[path.parent.name]["files"], found[path.parent.name]["groups"]  # noqa: B018
        except (ValueError, KeyError, TypeError, OSError) as error:
            raise BundleError(
                f"{path}: expected a manifest, got {error!r}; send {path.parent} again"
            ) from None
    if not found:
        raise BundleError(
            f"{folder}: expected the folders of a bundle, which `make pku-small-bundle` writes, got none; "
            f"send {folder}/1 and the others of transfers.txt"
        )
    first, *others = found
    different = [name for name in others if found[name] != found[first]]
    if different:
        raise BundleError(
            f"{folder}: expected folders of one bundle, got others in {first} and {', '.join(different)}; "
            "send all again"
        )
    return found[first]


def join(folder, target):
    """Writes the files of a bundle under `target`, after it has checked every piece and every file.

    A file that is there already with the right SHA-256 is left as it is.

    Raises:
        BundleError: A piece is missing or damaged; the line says what to send again. Nothing is written then.
    """
    folder, target = Path(folder), Path(target)
    manifest = read_manifest(folder)
    problems = {}
    for entry in manifest["files"].values():
        for piece in entry["pieces"]:
            path = folder / piece["path"]
            if not path.is_file():
                got = "no file"
            elif path.stat().st_size != piece["size"]:
                got = f"{path.stat().st_size} bytes"
            else:
                digest = sha256(path)
                got = f"SHA-256 {digest[:12]}…" if digest != piece["sha256"] else None
            if got:
                expected = f"{piece['size']} bytes of SHA-256 {piece['sha256'][:12]}…"
                problems.setdefault(piece["path"].split("/")[0], []).append((path, expected, got))
    if problems:
        path, expected, got = next(iter(problems.values()))[0]
        count = sum(map(len, problems.values()))
        more = f" (and {count - 1} other pieces)" if count > 1 else ""
        send = ", ".join(f"{folder}/{group}" for group in sorted(problems, key=int))
        raise BundleError(f"{path}: expected {expected}, got {got}{more}; send {send}")
    for name, entry in manifest["files"].items():
        join_file(folder, target / name, entry)
    return manifest


def join_file(folder, path, entry):
    if path.is_file() and path.stat().st_size == entry["size"] and sha256(path) == entry["sha256"]:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    digest = hashlib.sha256()
    with open(partial, "wb") as out:
        for piece in entry["pieces"]:
            with open(folder / piece["path"], "rb") as stream:
                while block := stream.read(BLOCK):
                    digest.update(block)
                    out.write(block)
    if digest.hexdigest() != entry["sha256"]:
        partial.unlink()
        raise BundleError(
            f"{path.name}: expected SHA-256 {entry['sha256'][:12]}… of the joined pieces, got "
            f"{digest.hexdigest()[:12]}…; make the bundle again and send all of it"
        )
    partial.replace(path)


def main(arguments):
    if len(arguments) != 2:
        sys.exit("usage: python bench/pku_small/bundle.py BUNDLE TARGET")
    try:
        manifest = join(*arguments)
    except BundleError as error:
        sys.exit(f"pku_small: {error}")
    print(f"bundle: {len(manifest['files'])} files in {manifest['groups']} transfers, all SHA-256 right")


if __name__ == "__main__":
    main(sys.argv[1:])
