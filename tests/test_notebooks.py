"""The notebooks in examples/ run at tiny sizes, and their saved outputs are small."""

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from PIL import Image
from sklearn.datasets import load_digits

import mae_fast

EXAMPLES = Path(mae_fast.__file__).parents[1] / "examples"
NOTEBOOKS = sorted(EXAMPLES.glob("*.ipynb"))
COLOURS = r"\x1b\[[\d;]*m"  # of a terminal, in tracebacks
LARGEST = 200_000  # bytes: GitHub shows larger ones slowly


def run(name, folder, parameters, check):
    """Execute a notebook in ``folder`` with other parameters, followed by the code ``check``."""
    notebook = nbformat.read(EXAMPLES / name, as_version=4)
    (place,) = [i for i, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", ())]
    for parameter in parameters:
        assert re.search(rf"^{parameter} = ", notebook.cells[place].source, re.M), parameter
    lines = [f"{parameter} = {value!r}" for parameter, value in parameters.items()]
    notebook.cells.insert(place + 1, nbformat.v4.new_code_cell("\n".join(lines)))
    notebook.cells.append(nbformat.v4.new_code_cell(check))
    where = {"metadata": {"path": str(folder)}}
    try:
        NotebookClient(notebook, timeout=240, kernel_name="python3", resources=where).execute()
    except CellExecutionError as error:
        pytest.fail(f"{name}: {re.sub(COLOURS, '', str(error))}", pytrace=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The digits dataset of scikit-learn as class folders. The notebooks run here one after the other."""
    root = tmp_path_factory.mktemp("notebooks")
    digits = load_digits()
    for i in range(400):
        path = root / "digits" / ("train" if i < 320 else "val") / str(digits.target[i]) / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((15 * digits.images[i]).astype("uint8")).save(path)
    return root


def test_drop_in(tmp_path):
    tiny = {"MODEL": "mae_vit_tiny_patch16", "STEPS": 8, "BATCH_SIZE": 2, "ROUNDS": 1}
    check = "assert min(losses[-2:]) < losses[0]\nassert abs(our_loss - their_loss) < 1e-5 * their_loss"
    run("drop_in.ipynb", tmp_path, tiny, check)


def test_pretrain_then_finetune(folder):
    fell = "losses = [line['train_loss'] for line in run.log if 'train_loss' in line]\nassert losses[-1] < losses[0]"
    run("pretrain.ipynb", folder, {"FOLDER": "digits", "EPOCHS": 2, "BATCH_SIZE": 16}, fell)
    assert Image.open(folder / "reconstruction.png").width > 100
    same = "assert difference < 1e-5\nassert difference_of_timm < 1e-5"
    run("finetune.ipynb", folder, {"FOLDER": "digits", "LABELS": 20, "EPOCHS": 4}, f"{fell}\n{same}")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_saved_outputs_are_complete_and_small(path):
    assert path.stat().st_size < LARGEST
    cells = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert {output.output_type for output in outputs} <= {"stream", "display_data", "execute_result"}
    assert not any("Warning" in output.get("text", "") for output in outputs)
    assert any("image/png" in output.get("data", ()) for output in outputs)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_links_work(path):
    text = "\n".join(cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "markdown")
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        file, _, heading = link.partition("#")
        titles = re.findall(r"^#+ (.*)$", (EXAMPLES / file).read_text(), re.M)
        assert not heading or heading in [title.lower().replace(" ", "-") for title in titles], link
