"""Reads the numbers out of a page, without a browser."""

import base64
import json
import re
import zlib


def numbers_of(content):
    packed = re.search(r'id="data">(.*?)</script>', content, flags=re.DOTALL).group(1)
    return json.loads(zlib.decompress(base64.b64decode(packed)))
