"""A command line as launch files have it: a repository's name, abbreviated flags, overrides of the model's config."""

import json
import shutil

REPOSITORY = "owner/tiny"
CONTEXT_LENGTH = 4096
MEM_FRACTION = 0.9
CHUNK = 128
ARGUMENTS = (
    *("--chunked-prefill-s", str(CHUNK), "--mem-frac", str(MEM_FRACTION), "--enable-mixed"),
    *("--json-model-override-args", json.dumps({"max_position_embeddings": CONTEXT_LENGTH})),
)


def cache(place, checkpoint):
    """The cache of the Hugging Face hub with one snapshot of ``checkpoint``: links to blobs, as the library does it."""
    repository, commit = place / f"models--{REPOSITORY.replace('/', '--')}", "a" * 40
    snapshot = repository / "snapshots" / commit
    for folder in (repository / "refs", repository / "blobs", snapshot):
        folder.mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    for file in checkpoint.iterdir():
        shutil.copy(file, repository / "blobs" / file.name)
        (snapshot / file.name).symlink_to(repository / "blobs" / file.name)
    return place
