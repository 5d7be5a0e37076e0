"""The places of tests that run on the device as well as on the host: here each is the device."""

import pytest

from tests.support.places import Place

# What the stand-ins cannot train: they have no sparse tensors, and torch asks for a cell of an LSTM
# that the CPU does not have.
UNSUPPORTED = ("sparse", "all_sparse", "lstm")

# Large suites of the host, of which every second setting is run with the slow tests here.
REPEATED = (
    "test_a_skip_equals_a_batch_left_out",
    "test_a_watched_training_is_bit_identical",
    "test_one_process_is_as_if_the_step_had_not_been",
    "test_the_numbers_of_one_process_equal_the_reference",
)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out the settings of other suites that a device cannot train."""
    left_out = [item for item in items if _model_of(item) in UNSUPPORTED]
    items[:] = [item for item in items if _model_of(item) not in UNSUPPORTED]
    config.hook.pytest_deselected(items=left_out)
    for name in REPEATED:
        again = [item for item in items if item.name.startswith(f"{name}[")]
        for item in again[1::2]:
            item.add_marker(pytest.mark.slow)


def _model_of(item: pytest.Item) -> str | None:
    arguments = (
        item.callspec.params
        if isinstance(item, pytest.Function) and hasattr(item, "callspec")
        else {}
    )
    setting = arguments.get("setting")
    return setting.get("model") if isinstance(setting, dict) else None


@pytest.fixture(scope="session")
def place() -> Place:
    """Gives the device."""
    from tests.support import device  # pytest reads this file before it knows which one

    return Place(
        str(device.DEVICE),
        type=device.DEVICE.type,
        to=device.to,
        tensor=device.tensor,
        late=device.late,
        counting=device.counting,
    )


@pytest.fixture(scope="session")
def away(place: Place) -> Place:
    """Gives the device, whose numbers come late."""
    return place


@pytest.fixture(scope="session")
def machine(place: Place) -> Place:
    """Gives what this session runs with: the device."""
    return place
