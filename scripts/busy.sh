# To be sourced. say TEXT; busy TEXT COMMAND...: runs a command that may take a minute or more, says
# for how long it has, and shows what it printed if it fails.
say() { printf '\033[1m%s\033[0m\n' "$*" >&2; }

# Tells how long this script has waited, until it is killed or the script is gone.
tick() {
  local began=$SECONDS
  while kill -0 $$ 2>/dev/null; do
    if [ -t 2 ]; then
      printf '\r  %d:%02d ' $(((SECONDS - began) / 60)) $(((SECONDS - began) % 60)) >&2
      sleep 1
    else
      sleep 30
      printf '  busy for %s s\n' $((SECONDS - began)) >&2
    fi
  done
}

busy() {
  local log ticker code=0 began=$SECONDS
  say "$1"
  shift
  log=$(mktemp)
  tick &
  ticker=$!
  # In the foreground, so that Ctrl-C reaches it.
  "$@" >"$log" 2>&1 </dev/null || code=$?
  { kill $ticker; wait $ticker; } 2>/dev/null || true
  [ ! -t 2 ] || printf '\r\033[K' >&2
  if [ $code = 0 ]; then
    printf '  done after %s s\n' $((SECONDS - began)) >&2
  else
    tail -n 30 "$log" >&2
    say "this failed with status $code: $*"
  fi
  rm -f "$log"
  return $code
}
