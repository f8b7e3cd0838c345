#!/bin/sh
# trim.sh SITE_PACKAGES: take out what no run reads, about 200 MB. In the image's build stage; needs binutils.
set -eu
cd "$1"

# The packages' own tests (numpy.testing imports some of numpy's), and headers to compile against Arrow
find . -path ./numpy -prune -o -type d -name tests -prune -exec rm -rf {} +
rm -rf pyarrow/include

# Symbol tables (.symtab): the linker reads .dynsym, which stays. Not what auditwheel rewrote (*.libs), whose sections
# strip can tear apart, and nothing of CUDA's, which could not be tried here. A file that strip refuses is left as it is.
find . \( -name '*.libs' -o -path ./nvidia -o -path './jax_*' \) -prune -o \
  -type f \( -name '*.so' -o -name '*.so.*' \) -size +300k -print |
  while read -r library; do
    if strip --strip-unneeded -o "$library.stripped" "$library" 2>/dev/null; then
      chmod --reference="$library" "$library.stripped"
      mv "$library.stripped" "$library"
    else
      rm -f "$library.stripped"
      echo "not stripped: $library"
    fi
  done
