"""Errors that a user can fix: what they say."""

import pytest

from dino_ssl.errors import UserError, import_extra


def test_a_missing_package_is_named_with_its_extra() -> None:
    assert import_extra("json.decoder", "search").JSONDecoder
    with pytest.raises(UserError, match=r'needs no_such_package: pip install "dino-ssl\[search\]"'):
        import_extra("no_such_package.metrics", "search")
