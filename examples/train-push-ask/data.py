"""Prints tickets with their codes, as JSON lines for `weft train`."""

import itertools
import json

from codes import tickets

from weft.demo.tasks import TRAIN, prompt

for ticket, code in itertools.islice(tickets(TRAIN), 600):
    print(json.dumps({"prompt": prompt(ticket), "completion": code}))
