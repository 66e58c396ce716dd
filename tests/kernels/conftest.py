"""Names of the kernels' test cases."""


def pytest_make_parametrize_id(val):
    """Sets in sorted order: parallel workers must agree on the names of tests."""
    if not isinstance(val, tuple):
        return None
    return "-".join("+".join(sorted(part)) if isinstance(part, set) else str(part) for part in val)
