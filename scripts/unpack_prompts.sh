#!/usr/bin/env bash
# Unpack the recordings of demo:asterisk-prompts from Debian's package (CC-BY-SA-3.0, Allison Smith) into an environment:
#   scripts/unpack_prompts.sh .venv
# Needs apt-get and dpkg-deb, no root. Where this machine knows no package lists, they are fetched into a folder of
# their own; the lists and mirrors of the machine stay as they are.
set -euo pipefail
PACKAGE=asterisk-core-sounds-en-wav
SOUNDS=usr/share/asterisk
target=$(realpath "$1")
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
installed=${SYSTEM_SOUNDS:-/usr/share/asterisk}
if [ -d "$installed/sounds/en_US_f_Allison" ]; then
	cp -RL "$installed" asterisk
else
	if ! command -v apt-get >/dev/null || ! command -v dpkg-deb >/dev/null; then
		echo "the audio demo and its tests need Debian's package $PACKAGE, and this machine has no apt-get: unpack" \
			"the package's $SOUNDS to $target/share/asterisk" >&2
		exit 3
	fi
	if ! apt-get download "$PACKAGE" 2>/dev/null; then
		mkdir -p lists/partial cache/archives/partial
		own=(-o Dir::State::Lists="$work/lists" -o Dir::Cache="$work/cache" -o APT::Sandbox::User=)
		apt-get "${own[@]}" -qq update
		apt-get "${own[@]}" -qq download "$PACKAGE"
	fi
	dpkg-deb -x "$PACKAGE"_*.deb unpacked
	mv "unpacked/$SOUNDS" asterisk
	cp "unpacked/usr/share/doc/$PACKAGE/copyright" asterisk/
fi
mkdir -p "$target/share"
rm -rf "$target/share/asterisk"
mv asterisk "$target/share/asterisk"
