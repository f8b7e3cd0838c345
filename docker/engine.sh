# Sourced by the other scripts: sets ENGINE to the first of docker, podman and buildah that works here.
# shellcheck shell=bash
engine() {
  local name
  for name in ${ENGINE:-docker podman buildah}; do
    case $name in
      docker) docker info >/dev/null 2>&1 || continue ;; # a client without an engine builds nothing
      *) command -v "$name" >/dev/null || continue ;;
    esac
    echo "$name"
    return
  done
  echo "error: no ${ENGINE:-docker engine, podman or buildah} here" >&2
  exit 2
}
ENGINE=$(engine)
