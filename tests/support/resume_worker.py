"""Run by test_resume.py in several processes: command lines one after the other, without reports."""

import json
import sys

import kit


def main():
    with kit.no_report():
        for words in json.loads(sys.argv[1]):
            code = kit.main(*words)
            if code:
                sys.exit(f"{' '.join(words)} ended with {code}")


if __name__ == "__main__":
    main()
