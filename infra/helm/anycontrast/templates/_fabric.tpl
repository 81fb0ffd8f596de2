{{/* The fabric: resources, capabilities, pod settings and NCCL environment belong together. */}}

{{/* Whether NCCL uses RDMA; on the node's network only with a device. Empty means no. */}}
{{- define "anycontrast.hasRdma" -}}
{{- $fabric := .Values.network.fabric -}}
{{- if or (has $fabric (list "rdmaShared" "sriov")) (and (eq $fabric "hostNetwork") .Values.network.rdma.resourceName) -}}yes{{- end -}}
{{- end -}}

{{/* Device resources of a worker, as YAML. */}}
{{- define "anycontrast.fabricResources" -}}
{{- $rdma := .Values.network.rdma -}}
{{- if include "anycontrast.hasRdma" . -}}
{{ $rdma.resourceName }}: {{ $rdma.count | int | quote }}
{{- end -}}
{{- end -}}

{{/* Annotations of a worker's pod, as YAML. */}}
{{- define "anycontrast.fabricAnnotations" -}}
{{- if eq .Values.network.fabric "sriov" -}}
k8s.v1.cni.cncf.io/networks: {{ .Values.network.sriov.networks | quote }}
{{- end -}}
{{- end -}}

{{/* Environment of a worker. NCCL_NET names the transport, so that NCCL stops instead of falling
back to TCP in silence where the fabric does not work. */}}
{{- define "anycontrast.fabricEnv" -}}
{{- $network := .Values.network -}}
- name: NCCL_SOCKET_IFNAME
  value: {{ $network.interface | quote }}
- name: GLOO_SOCKET_IFNAME
  value: {{ $network.interface | quote }}
{{- if not (include "anycontrast.hasRdma" .) }}
- name: NCCL_NET
  value: Socket
- name: NCCL_IB_DISABLE
  value: "1"
{{- else }}
- name: NCCL_NET
  value: IB
- name: NCCL_IB_DISABLE
  value: "0"
{{- with $network.rdma.hca }}
- name: NCCL_IB_HCA
  value: {{ . | quote }}
{{- end }}
{{- if ge ($network.rdma.gidIndex | int) 0 }}
- name: NCCL_IB_GID_INDEX
  value: {{ $network.rdma.gidIndex | int | quote }}
{{- end }}
{{- end }}
{{- end -}}

{{/* Capabilities of Ray's container on a worker: locking memory, which RDMA needs. */}}
{{- define "anycontrast.fabricCapabilities" -}}
{{- if include "anycontrast.hasRdma" . -}}
add: [IPC_LOCK]
{{ end -}}
drop: [ALL]
{{- end -}}
