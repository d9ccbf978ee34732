#!/usr/bin/env bash
# One prefill and one decode engine on two hosts of a private network. Not yet run on a GPU.
#
# Once: make a key on one host, and copy it to the other over a secure channel. The file must be private.
#   (umask 077; head -c 32 /dev/urandom | od -An -tx1 | tr -d ' \n' > deployment.key)
#
# Then one command each, with the hosts' addresses on the private network:
#   prefill host:   two_hosts.sh prefill MODEL 10.0.0.1
#   decode host:    two_hosts.sh decode  MODEL 10.0.0.2
#   either host:    two_hosts.sh proxy   10.0.0.1 10.0.0.2
#
# Besides the API ports, decode reaches prefill's control port (14579) and the ports that NIXL's transport chooses.
set -euo pipefail

case ${1:-} in
  prefill)
    exec vllm serve "$2" --kv-role prefill --kv-key-file deployment.key --host "$3" --port 8100 --kv-control-host "$3"
    ;;
  decode)
    exec vllm serve "$2" --kv-role decode --kv-key-file deployment.key --host "$3" --port 8200
    ;;
  proxy)
    # Nothing guards this port: put your own gateway in front, or give the engines --api-key and the clients that key.
    exec vllm-disagg proxy --host 0.0.0.0 --prefill "http://$2:8100" --decode "http://$3:8200"
    ;;
  *)
    echo "usage: two_hosts.sh prefill|decode MODEL ADDRESS, or two_hosts.sh proxy PREFILL_ADDRESS DECODE_ADDRESS" >&2
    exit 2
    ;;
esac
