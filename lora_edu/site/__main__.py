"""`python -m lora_edu.site [NAME ...]`, which is what `make site` runs."""

import sys

from lora_edu.cli import make_printable
from lora_edu.site.book import main

make_printable()
sys.exit(main())
